# %% [markdown]
# # 5. Bytes on disk
#
# **What is in a 4-bit checkpoint, byte by byte?**
#
# - You will be able to read a 4-bit checkpoint with only `struct` and `json`.
# - You need notebook 4. The notebook takes 10 minutes.
# - To run it yourself: `pip install -e '.[notebooks]'` in a checkout of refq4 ([how](README.md)).
#
# ## Two codes in a byte
#
# A code has four bits, so two codes are stored in one byte, *the first in the high half*. Here are eight weights,
# their codes, and the four bytes:

# %%
import json
import struct
import tempfile
from pathlib import Path

import torch

import refq4
from refq4 import layout
from refq4.functional import QuantState, dequantize_4bit, quantize_4bit
from support import picture
from support.material import FEED_FORWARD, encoder_linear, quiet_bitsandbytes

weights = torch.tensor([0.5, -1.0, 0.0, 0.1, 0.75, -0.2, 0.3, 1.0])
packed, state = quantize_4bit(weights, quant_type="nf4")
codes = layout.unpack(packed.flatten(), weights.numel())

print("weights", *(f"{w:5.2f}" for w in weights.tolist()))
print("codes  ", *(f"{c:5}" for c in codes.tolist()))
print("bytes  ", *(f"{b:#11x}" for b in packed.flatten().tolist()))
assert packed.flatten().tolist() == [
    16 * codes[i] + codes[i + 1] for i in range(0, 8, 2)
]
assert torch.equal(layout.pack(codes, pad_code=7), packed.flatten())

# %%
figure, axes = picture.canvas(height=1.6)
for i, (weight, code) in enumerate(zip(weights.tolist(), codes.tolist(), strict=True)):
    axes.barh(0, 0.98, left=i, color=picture.COLOURS[(i // 2) % 2 * 5], height=0.9)
    axes.text(
        i + 0.5,
        0,
        f"{code:04b}",
        color="black" if i // 2 % 2 else "white",
        ha="center",
        va="center",
        family="monospace",
    )
    axes.text(i + 0.5, 0.75, f"{weight:g}", ha="center")
for i in range(4):
    axes.text(
        2 * i + 1,
        -0.85,
        f"byte {i}: {packed[i].item():#04x}",
        ha="center",
        family="monospace",
    )
axes.set(xlim=(0, 8), ylim=(-1, 1.1))
axes.axis("off")
picture.show(
    figure,
    "Eight weights above their codes in binary; each two neighbours make a byte, the "
    "first its high half.",
)

# %% [markdown]
# If the number of weights is odd, half a byte is not used; it has the code of 0.

# %%
packed, _ = quantize_4bit(torch.tensor([1.0, 1.0, 1.0]), quant_type="nf4")
print(*(f"{byte:#x}" for byte in packed.flatten().tolist()))
assert packed.flatten().tolist() == [0xFF, 0xF7]

# %% [markdown]
# ## The same bytes under another name
#
# The type of a packed weight need not be `uint8`. Some tools that split a model over several machines (for example
# FSDP, fully sharded data parallel) need all parameters of a model in one type, for example bfloat16. So the bytes
# can be *stored as* bfloat16, with two bytes in each number. Nothing is converted: the bits are the same, only the
# type is different. Read as numbers they have no meaning, and a cast to another type would destroy them.

# %%
W = encoder_linear(FEED_FORWARD).weight.data
rows, columns = [], {}
for dtype in layout.STORAGE_DTYPES:
    stored, _ = quantize_4bit(W, quant_type="nf4", quant_storage=dtype)
    columns[dtype] = stored.flatten().view(torch.uint8)
    rows.append(
        [
            str(dtype).removeprefix("torch."),
            list(stored.shape),
            f"{stored.nbytes:,}",
            f"{stored[0].item():.6g}",
        ]
    )

assert all(torch.equal(column, columns[torch.uint8]) for column in columns.values())
picture.table(["stored as", "shape", "bytes", "the first, read as a number"], rows)

# %% [markdown]
# ## A checkpoint of bitsandbytes
#
# Now we look at a real file that bitsandbytes 0.50.2 wrote, with its own layer, the weights of our encoder, and
# double quantisation.

# %%
bitsandbytes = quiet_bitsandbytes()

linear = encoder_linear(FEED_FORWARD)
theirs = bitsandbytes.nn.Linear4bit(
    384, 1536, quant_type="nf4", compress_statistics=True
)
theirs.load_state_dict(linear.state_dict())
theirs.to("cpu")  # the moment of quantisation

from safetensors.torch import save_file

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "layer.safetensors"
save_file(theirs.state_dict(), path)
print(
    f"bitsandbytes {bitsandbytes.__version__} wrote {path.stat().st_size:,} bytes for "
    f"{W.numel():,} weights and a bias"
)

# %% [markdown]
# You need no library to open it. The first eight bytes are the length of the header. The header is JSON, and says
# where each tensor is. The rest of the file is the tensors.

# %%
raw = path.read_bytes()
(length,) = struct.unpack("<Q", raw[:8])
header = json.loads(raw[8 : 8 + length])
body = raw[8 + length :]

rows = []
for key, entry in header.items():
    if key != "__metadata__":
        first, last = entry["data_offsets"]
        rows.append([f"`{key}`", entry["dtype"], entry["shape"], first, last - first])
rows.sort(key=lambda row: row[3])
picture.table(["key", "type", "shape", "first byte", "bytes"], rows)

# %%
sizes = {
    key: header[key]["data_offsets"][1] - header[key]["data_offsets"][0]
    for key in header
    if key != "__metadata__"
}
assert 8 + length + sum(sizes.values()) == len(raw)

figure, axes = picture.canvas(height=2.6)
names = sorted(sizes, key=sizes.get)
axes.barh(names, [sizes[name] for name in names], color=picture.BLUE)
for row, name in enumerate(names):
    axes.text(sizes[name] * 1.15, row, f"{sizes[name]:,}", va="center")
axes.set(
    xscale="log",
    xlim=(10, 2e6),
    xlabel="bytes (each step of the scale ten times the last)",
)
axes.grid(axis="y", visible=False)
picture.show(
    figure,
    "Bars of bytes by key on a logarithmic scale: the packed weight dwarfs everything "
    "else.",
)

# %% [markdown]
# These are the keys:
#
# | key | what it is |
# | --- | --- |
# | `weight` | the packed codes, two in a byte, as one column |
# | `weight.absmax` | the scales; one byte each, because they are also quantised |
# | `weight.quant_map` | the sixteen values of the code |
# | `weight.nested_absmax` | the scales of the scales |
# | `weight.nested_quant_map` | the 256 values for the scales |
# | `weight.quant_state.bitsandbytes__nf4` | everything that is not a tensor: JSON text, as a tensor of bytes |
# | `bias` | the bias, as it was |


# %%
def bytes_of(key):
    first, last = header[key]["data_offsets"]
    return body[first:last]


described = json.loads(bytes_of("weight.quant_state.bitsandbytes__nf4"))
print(json.dumps(described, indent=1))
assert described["shape"] == [1536, 384]

# %% [markdown]
# ## One weight, by hand
#
# The file has nothing else. Now decode weight number 1000: in which byte is it, in which half, in which block, and
# what is its value?

# %%
i = 1000
byte = bytes_of("weight")[i // 2]
code = byte >> 4 if i % 2 == 0 else byte & 15
value = struct.unpack("<16f", bytes_of("weight.quant_map"))[code]

block = i // described["blocksize"]
q = bytes_of("weight.absmax")[block]
second_scale = struct.unpack_from(
    "<f", bytes_of("weight.nested_absmax"), 4 * (block // described["nested_blocksize"])
)[0]
scale = (
    struct.unpack_from("<f", bytes_of("weight.nested_quant_map"), 4 * q)[0]
    * second_scale
    + described["nested_offset"]
)

print(f"byte {i // 2} is {byte:#04x}, so code {code}, so value {value:.6f}")
print(f"block {block}, scale code {q}, so scale {scale:.6f}")
print(f"weight {value * scale:.6f}, before quantisation {W.flatten()[i].item():.6f}")

# %% [markdown]
# refq4 reads such a file without conversion, into a layer or into a `QuantState`. Every weight then decodes to the
# same bits as in bitsandbytes, and weight 1000 to the number that we computed by hand.

# %%
from safetensors.torch import load_file

checkpoint = load_file(path)
layer = refq4.nn.Linear4bit(384, 1536, quant_type="nf4")
layer.load_state_dict(checkpoint)

mine = dequantize_4bit(layer.weight, layer.quant_state)
peer = bitsandbytes.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
assert torch.equal(mine, peer)
assert abs(mine.flatten()[i].item() - value * scale) < 1e-7
print("all", f"{mine.numel():,}", "weights are the same, to the bit")

# %% [markdown]
# The other direction also works: a file that refq4 saves has the same keys, types and shapes, and bitsandbytes 0.50.2
# reads it.

# %%
saved = layer.state_dict()
assert {key: (t.dtype, t.shape) for key, t in saved.items()} == {
    key: (t.dtype, t.shape) for key, t in checkpoint.items()
}
assert all(torch.equal(saved[key], checkpoint[key]) for key in checkpoint)

state = {
    key.removeprefix("weight."): value
    for key, value in saved.items()
    if key.startswith("weight.")
}
again = bitsandbytes.nn.Params4bit.from_prequantized(
    saved["weight"], state, device="cpu"
)
assert torch.equal(
    bitsandbytes.functional.dequantize_4bit(again, again.quant_state), mine
)
print(f"{len(saved)} entries, byte for byte those of the file")

# %% [markdown]
# ## A file with a wrong entry
#
# A checkpoint may come from a source that you do not know. refq4 checks it before using it, and the error names the
# key, what was found and what was expected. In this file the blocksize was changed from 64 to 128:

# %%
stats = {key: value for key, value in checkpoint.items() if key.startswith("weight.")}
lie = json.dumps(described | {"blocksize": 128}).encode()
try:
    QuantState.from_dict(
        stats
        | {
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(lie), dtype=torch.uint8
            )
        }
    )
except ValueError as error:
    print(error)
else:
    raise AssertionError("a wrong blocksize went through")

# %%
folder.cleanup()

# %% [markdown]
# **Summary:** a 4-bit weight on disk is a column of bytes with two codes each, scales (here in 8 bits,
# with their own scales), two small tables, and a line of JSON. A few lines of Python can read it without any library.

# %% [markdown]
# ## Exercises
#
# Put your answer in place of each `...`, run the cell, and read what it says. The solutions are folded.
#
# **5.1** Return the two codes in a byte, in the order of the weights.

# %% tags=["exercise"]
from support import exercises


def unpack(byte): ...


exercises.check("5.1", unpack)

# %% [markdown]
# <details><summary>A solution to 5.1</summary>
#
# ```python
# def unpack(byte):
#     return byte >> 4, byte & 15
# ```
#
# </details>

# %% [markdown]
# **5.2** A layer of 1000 × 300 in blocks of 64, with double quantisation: how many bytes does `weight.absmax` have in
# the file?

# %% tags=["exercise"]
answer = ...
exercises.check("5.2", answer)

# %% [markdown]
# <details><summary>A solution to 5.2</summary>
#
# ```python
# import math
#
# answer = math.ceil(1000 * 300 / 64)
# ```
#
# </details>

# %% [markdown]
# **Next:** [the forward pass, step by step](06_the_forward_pass.ipynb)
