"""flops.py: what a token costs by formula, and what a card can do: for the log's MFU, and for
estimates. Nothing here needs torch."""

# Name, as torch.cuda.get_device_name() says it without "NVIDIA" and "GeForce" -> bf16 products
# summed in fp32, dense, in TFLOP/s; memory in GB; its bandwidth in GB/s. From NVIDIA's data sheets
# (H100, H200, A100, L40S, L4, A10: half of what they print "with sparsity") and its whitepapers on
# Ada and GA102 (GeForce). What stands elsewhere of a card that is not here is no data sheet.
CARDS = {
    "H200": (989.4, 141, 4800), "H100 80GB HBM3": (989.4, 80, 3350), "H100 PCIe": (756, 80, 2000),
    "A100-SXM4-80GB": (312, 80, 2039), "A100 80GB PCIe": (312, 80, 1935),
    "A100-SXM4-40GB": (312, 40, 1555), "A100-PCIE-40GB": (312, 40, 1555),
    "L40S": (362, 48, 864), "L4": (121, 24, 300), "A10": (125, 24, 600),
    "RTX 4090": (165.2, 24, 1008), "RTX 4080": (97.5, 16, 717), "RTX 3090": (71, 24, 936)}


def card(name):
    """(FLOP/s, bytes, bytes/s) of the card that calls itself so; of an unknown one None. The whole
    name counts: a laptop's RTX 4090, a slice of an H100 or an A10G is another card."""
    found = CARDS.get(name.replace("NVIDIA", "").replace("GeForce", "").strip())
    return found and tuple(x * scale for x, scale in zip(found, (1e12, 1e9, 1e9)))


def cards_like(part):
    """The names of the cards that begin so, whatever the case, or have it as a word: "h100"."""
    part = part.lower().replace("nvidia", "").replace("geforce", "").strip()
    return [name for name in CARDS if name.lower() == part] or [
        name for name in CARDS if part and f" {part} " in f" {name.lower().replace('-', ' ')} "]


def matrices(shape):
    """Weights that multiply each token: those of the blocks, and those of the head. Of a GPTConfig
    as a dict; what it leaves out is as in GPT-2."""
    C, heads = shape["n_embd"], shape["n_head"]
    d = shape.get("head_dim") or C // heads
    kv, gates = shape.get("n_kv_head") or heads, 3 if shape.get("mlp") == "swiglu" else 2
    wide = shape.get("n_ff") or (4 * C if gates == 2 else -(-8 * C // 3 // 64) * 64)
    return shape["n_layer"] * C * (2 * d * (heads + kv) + gates * wide), shape["vocab_size"] * C


def flops(shape, length, head=True):
    """Of one token's forward pass, in a row of `length` tokens: 2 for each weight (a product and a
    sum), and attention to length / 2 tokens, as many as stand before it on the average, once for
    q k and once for p v. A training step takes 3 times that: the backward pass twice. Norms, the
    softmax and what the optimizer does are left out, and whatever is computed twice."""
    blocks, table = matrices(shape)
    wide = shape["n_head"] * (shape.get("head_dim") or shape["n_embd"] // shape["n_head"])
    attention = shape["n_layer"] * 2 * wide * length
    return 2 * (blocks + table * head) + attention
