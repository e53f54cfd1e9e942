"""Write the golden vectors in ``tests/peer/golden``: what bitsandbytes gave, so that the tests know without it.

Run once in each of two virtual environments; the version that is installed decides what is written:

    python3.11 -m venv peer && peer/bin/pip install torch==2.13.0 numpy safetensors bitsandbytes==0.50.2
    peer/bin/python scripts/peer/make_golden.py        tables, quantized, nested, layers_0_50_2  .safetensors

    python3.11 -m venv seed && seed/bin/pip install torch==2.13.0 numpy safetensors bitsandbytes==0.49.1
    seed/bin/python scripts/peer/make_golden.py        layers_0_49_1.safetensors, behaviour_0_49_1.json

refq4 is not imported: a golden file must not depend on what it judges. Inputs are drawn so that the rules on which the
two differ on purpose (``docs/differences.md``) don't come into it: see ``away_from_fp4_pivots``. Everything runs on
the CPU, layers in training mode: inference rewrites their weight (same page).
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
sys.modules["kernels"] = None  # the peer as its wheel is, without kernels fetched from elsewhere

import bitsandbytes  # noqa: E402
import bitsandbytes.functional as peer  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "tests" / "peer" / "golden"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGE = {"uint8": torch.uint8} | DTYPES
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def main() -> None:
    torch.manual_seed(0)
    version = bitsandbytes.__version__
    name = version.replace(".", "_")
    if version == "0.50.2":
        write("tables", tables())
        write("quantized", quantized())
        write("nested", nested())
        write(f"layers_{name}", layers(STORAGE))
    elif version == "0.49.1":
        write(f"layers_{name}", layers({"uint8": torch.uint8}))
        path = GOLDEN / f"behaviour_{name}.json"
        lines = ",\n".join(json.dumps(case) for case in [*behaviour(), *dispatch()])
        path.write_text(f"[\n{lines}\n]\n")
        print(path.name, path.stat().st_size)
    else:
        raise SystemExit(f"bitsandbytes {version} is installed; the golden files are of 0.50.2 and 0.49.1: see --help")


def write(name: str, tensors: dict[str, Tensor]) -> None:
    path = GOLDEN / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    made_with = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__.split('+')[0]}"
    plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(plain, path, metadata={"made_with": made_with})
    print(path.name, path.stat().st_size)


# --- what is in the files -------------------------------------------------------------------------------------------


def tables() -> dict[str, Tensor]:
    """Codes by name, and dynamic maps as ``dynamic/<signed>/<exponent bits>/<total bits>``."""
    found = {name: peer.get_4bit_type(name, device="cpu") for name in ("nf4", "fp4", "af4")}
    for signed, exponent_bits, total_bits in ((True, 7, 8), (True, 5, 8), (True, 3, 4), (False, 7, 8)):
        kind = "signed" if signed else "unsigned"
        found[f"dynamic/{kind}/{exponent_bits}/{total_bits}"] = peer.create_dynamic_map(
            signed, exponent_bits, total_bits
        )
    return found


def quantized() -> dict[str, Tensor]:
    """``<case>/x``, and for each type and blocksize ``<case>/<type>/<blocksize>/packed|absmax|decoded``."""
    found: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        x = away_from_fp4_pivots((torch.randn(4, 1024) * 0.05).to(dtype))
        for blocksize in BLOCKSIZES:
            add(found, name, x, blocksize, decoded=blocksize in (32, 64, 4096))
    for numel in (1, 2, 33, 63, 65, 127, 129):
        add(found, f"odd/{numel}", away_from_fp4_pivots(torch.randn(numel)), 64)
    zeros = away_from_fp4_pivots(torch.randn(4, 64))
    zeros[1:3] = 0
    add(found, "zero blocks", zeros, 64)

    nf4 = peer.get_4bit_type("nf4", device="cpu")
    found["thresholds/x"] = x = both_sides((nf4[:-1] + nf4[1:]) / 2)
    found["thresholds/nf4/64/packed"], _ = peer.quantize_4bit(x, blocksize=64, quant_type="nf4")
    found["fp4 thresholds/x"] = x = beside_fp4_pivots()
    found["fp4 thresholds/fp4/64/packed"], _ = peer.quantize_4bit(x, blocksize=64, quant_type="fp4")
    return found


def add(found: dict[str, Tensor], case: str, x: Tensor, blocksize: int, decoded: bool = True) -> None:
    found[f"{case}/x"] = x
    for quant_type in QUANT_TYPES:
        key = f"{case}/{quant_type}/{blocksize}"
        packed, state = peer.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        found[f"{key}/packed"], found[f"{key}/absmax"] = packed, state.absmax
        if decoded:
            with torch.compiler.set_stance("force_eager"):
                found[f"{key}/decoded"] = peer.dequantize_4bit(packed, state).reshape(x.shape)


def away_from_fp4_pivots(x: Tensor) -> Tensor:
    """Numbers whose scaled value comes near an FP4 pivot, at any blocksize, replaced by smaller ones or by 0.

    The peer's CPU build and refq4 disagree within 4e-7 of a pivot and on the code of tiny numbers.
    """
    limit = 0.01 * x.abs().max()
    x = torch.where(x.abs() < limit, torch.zeros_like(x), x)
    pivots = torch.tensor(PIVOTS)
    for _ in range(100):
        near = torch.zeros(x.numel(), dtype=torch.bool)
        for blocksize in BLOCKSIZES:
            blocks = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % blocksize)).view(-1, blocksize)
            scaled = (blocks / blocks.abs().amax(1, keepdim=True)).abs().view(-1)[: x.numel()]
            near |= ((scaled.unsqueeze(1) - pivots).abs() < 1e-5).any(1)
        if not near.any():
            return x
        x = torch.where(near.view(x.shape), x * 0.97, x)
    raise RuntimeError("no numbers away from the pivots were found")


def both_sides(thresholds: Tensor) -> Tensor:
    """Each threshold, the fp32 numbers next to it, and a 1.0 that makes the block's scale 1: 64 numbers."""
    below, above = (torch.nextafter(thresholds, torch.tensor(end)) for end in (-2.0, 2.0))
    x = torch.cat([torch.ones(1), below, thresholds, above])
    return torch.nn.functional.pad(x, (0, 64 - x.numel()))


def beside_fp4_pivots() -> Tensor:
    """On either side of each pivot, the nearest fp32 number for which the peer's CPU and CUDA rules agree; 64 numbers.

    CUDA: the magnitude goes up on |x| > pivot. CPU: the value goes up on x > midpoint.
    """
    magnitudes = peer.get_4bit_type("fp4", device="cpu").abs().unique()
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    found = [1.0]
    for i, (pivot, midpoint) in enumerate(zip(torch.tensor(PIVOTS), midpoints, strict=True)):
        bits = int(pivot.view(torch.int32))
        near = torch.arange(bits - 40, bits + 41, dtype=torch.int32).view(torch.float32)
        up = near > pivot
        for sign, peers_up in ((1, near > midpoint), (-1, near >= midpoint)):
            found.append(sign * float(near[up & peers_up].min()))
            if i > 0:  # below the first pivot lie the tiny numbers, on whose code the two never agree
                found.append(sign * float(near[~up & ~peers_up].max()))
    return torch.nn.functional.pad(torch.tensor(found), (0, 64 - len(found)))


def nested() -> dict[str, Tensor]:
    """``<dtype>/x``, ``<dtype>/packed``, ``<dtype>/decoded`` and ``<dtype>/state/...`` as in a state dict."""
    found: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        x = (torch.randn(290, 32) * torch.rand(290, 1)).to(dtype)
        packed, state = peer.quantize_4bit(x, blocksize=32, quant_type="nf4", compress_statistics=True)
        found |= {f"{name}/x": x, f"{name}/packed": packed, f"{name}/decoded": peer.dequantize_4bit(packed, state)}
        found |= {f"{name}/state/{key}": value for key, value in state.as_dict(packed=True).items()}
    return found


def layers(storages: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Inputs ``x/<dtype>``, ``grad_y/<dtype>``; layers ``<type> <nested> <storage>/state_dict/...`` and, per compute
    dtype, ``.../<dtype>/y``, ``.../grad_x`` and ``.../grad_bias``.
    """
    n, k = 16, 128
    found: dict[str, Tensor] = {}
    weight, bias = torch.randn(n, k) * 0.1, torch.randn(n)
    x, grad_y = torch.randn(5, k), torch.randn(5, n)
    for name, dtype in DTYPES.items():
        found |= {f"x/{name}": x.to(dtype), f"grad_y/{name}": grad_y.to(dtype)}
    for quant_type in QUANT_TYPES:
        for is_nested in (False, True):
            for storage_name, storage in storages.items():
                case = f"{quant_type} {'nested' if is_nested else 'plain'} {storage_name}"
                layer = quantized_layer(weight, bias, quant_type, is_nested, storage)
                found |= {f"{case}/state_dict/{key}": value.clone() for key, value in layer.state_dict().items()}
                for name, dtype in DTYPES.items():
                    layer = quantized_layer(weight, bias, quant_type, is_nested, storage, dtype)
                    a = found[f"x/{name}"].clone().requires_grad_()
                    y = layer(a)
                    y.backward(found[f"grad_y/{name}"])
                    found |= {f"{case}/{name}/y": y, f"{case}/{name}/grad_x": a.grad}
                    found[f"{case}/{name}/grad_bias"] = layer.bias.grad
    return found


def quantized_layer(
    weight: Tensor,
    bias: Tensor,
    quant_type: str,
    is_nested: bool,
    storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        k,
        n,
        quant_type=quant_type,
        compress_statistics=is_nested,
        quant_storage=storage,
        compute_dtype=compute_dtype,
    )
    layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()})
    return layer.to("cpu").train()


def behaviour() -> list[dict[str, object]]:
    """What a first forward decides and says, for each compute dtype given, input dtype, and one token or several."""
    cases = []
    for compute_dtype in (None, *DTYPES.values()):
        for dtype in DTYPES.values():
            for tokens in (1, 3):
                layer = quantized_layer(torch.ones(8, 64), torch.zeros(8), "nf4", True, compute_dtype=compute_dtype)
                cases.append(watch(layer, torch.ones(tokens, 64, dtype=dtype), compute_dtype))
    unquantized = bitsandbytes.nn.Linear4bit(64, 8)
    cases.append(watch(unquantized, torch.ones(1, 64), None) | {"quantized": False})
    return cases


def watch(layer: torch.nn.Module, x: Tensor, given: torch.dtype | None) -> dict[str, object]:
    error = result = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = layer(x)
        except Exception as e:
            error = type(e).__name__
    return {
        "compute_dtype_given": plain(given),
        "input_dtype": plain(x.dtype),
        "tokens": x.shape[0],
        "quantized": True,
        "compute_dtype_after": plain(layer.compute_dtype),
        "output_dtype": plain(None if result is None else result.dtype),
        "error": error,
        # torch says of a function the peer uses that it will go away: a FutureWarning, and none of the peer's own
        "warnings": [
            {"category": w.category.__name__, "mentions_training": "training" in str(w.message)}
            for w in caught
            if not issubclass(w.category, FutureWarning)
        ],
    }


def dispatch() -> list[dict[str, object]]:
    """Which way matmul_4bit goes on a GPU, and whether it warns: stand-ins for the operands, as there is none here."""
    import bitsandbytes.autograd._functions as functions

    cases = []
    with (
        mock.patch.object(functions.F, "gemv_4bit", return_value="gemv_4bit"),
        mock.patch.object(functions.MatMul4Bit, "apply", return_value="MatMul4Bit"),
    ):
        for shape in ((64,), (1, 64), (1, 1, 64), (96,), (1, 96), (3, 64), (2, 3, 64), (3, 96), (0, 64)):
            for requires_grad in (False, True):
                for in_own_layout in (False, True):
                    device = SimpleNamespace(type="cpu" if in_own_layout else "cuda")
                    size = torch.Size(shape)
                    a = SimpleNamespace(
                        device=device, shape=size, numel=size.numel, requires_grad=requires_grad, dtype=torch.float32
                    )
                    b = SimpleNamespace(t=lambda: None)
                    state = SimpleNamespace(blocksize=64, packing_format_for_cpu=in_own_layout)
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        way = functions.matmul_4bit(a, b, state)
                    cases.append(
                        {
                            "dispatch": way,
                            "shape": shape,
                            "requires_grad": requires_grad,
                            "in_own_layout": in_own_layout,
                            "blocksize": 64,
                            "warnings": len(caught),
                        }
                    )
    return cases


def plain(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(__doc__)
    main()
