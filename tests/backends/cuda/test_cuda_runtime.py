"""Around the CUDA kernels: what is missing on a machine and what is said, compiling, the cache, launching, choosing.

No test here needs a GPU. A missing part is really missing (a module that can't be imported, a library that is not
there), and launches go through cuda-python to ``fake_cuda.c``, a driver that writes down what it is asked.
"""

from __future__ import annotations

import ast
import json
import os
import re
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from patience import BUSY

import refq4
from refq4 import registry
from refq4.backend import OPS, Call, PackedWeight, PreparedWeight
from refq4.codebooks import get_codebook
from refq4.internals import remedies
from refq4.internals.buildcache import CacheError
from refq4.testing.isolation import isolated_registry

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from refq4_cuda import CudaBackend, CudaEmulatorBackend, emulated, launch, nvrtc

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-python is not installed: pip install -e '.[test]'")

pytestmark = pytest.mark.reference_only("it names its backends itself")
CODE = get_codebook("nf4").on("cpu")


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; its failure is the test's."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=BUSY)
    assert done.returncode == 0, done.stderr
    return done


# --- importing and choosing touch nothing -----------------------------------------------------------------------------

QUIET = """
import json, sys, torch
def opened():
    return {line.split()[-1] for line in open("/proc/self/maps") if "libcuda" in line or "libnvrtc" in line}
modules, libraries = set(sys.modules), opened()
import refq4
names = refq4.list_backends()
with refq4.trace() as t:
    refq4.nn.LinearNF4(64, 8).to("cpu").eval()(torch.ones(1, 64))
added = [m for m in set(sys.modules) - modules if m.split(".")[0] == "cuda" or m.startswith("refq4_cuda.emulator.")]
print(json.dumps([names, added, sorted(opened() - libraries), torch.cuda.is_initialized(), t.text(width=300)]))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps, which Linux has")
def test_importing_listing_and_a_call_on_the_cpu_touch_no_cuda():
    names, modules, libraries, initialised, trace = json.loads(python(QUIET, REFQ4_BACKEND="").stdout)
    assert {"cuda", "cuda-emulator"} <= set(names)
    assert (modules, libraries, initialised) == ([], [], False)
    assert "gemv_4bit" in trace


def test_only_one_file_opens_the_door_to_cuda():
    package = Path(emulated.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "cuda" for name in names), f"{path.name} imports {names}"
    dynamic = [path.name for path in package.rglob("*.py") if "import_module(" in path.read_text()]
    assert dynamic == ["bindings.py"]


def test_auto_never_takes_the_emulator_and_lists_it_last():
    names = refq4.list_backends()
    assert names.index("cuda-emulator") > names.index("reference")
    assert "cuda-emulator" not in registry.automatic_backends()
    for op in OPS:
        chosen, passed_over = registry.resolve(_call(op, "cpu"), "auto")
        assert chosen.name != "cuda-emulator"
        assert "cuda-emulator" not in dict(passed_over)


def test_a_backend_of_negative_priority_is_not_taken_even_if_no_other_can(reference_alone):
    class Eager(CudaEmulatorBackend):
        name = "eager"
        devices = ("meta",)

        def available(self):
            return None

    refq4.register_backend(Eager())
    with pytest.raises(refq4.BackendUnsupportedError, match="no backend can run") as refusal:
        registry.resolve(_call("gemv_4bit", "meta"), "auto")
    assert "eager" not in str(refusal.value)
    assert registry.resolve(_call("gemv_4bit", "meta"), "eager")[0].name == "eager"


def test_auto_asks_a_backend_of_another_device_not_even_whether_it_is_available(reference_alone):
    class Elsewhere(CudaBackend):
        name = "elsewhere"

        def available(self):
            raise AssertionError("asked, and a driver would have been started")

    refq4.register_backend(Elsewhere())
    assert refq4.list_backends() == ["elsewhere", "reference"]
    chosen, passed_over = registry.resolve(_call("gemv_4bit", "cpu"), "auto")
    assert chosen.name == "reference"
    assert passed_over == [("elsewhere", "it computes on cuda, and the tensors are on cpu")]


@pytest.fixture
def reference_alone():
    with isolated_registry():
        for name in refq4.list_backends():
            if name != "reference":
                refq4.unregister_backend(name)
        yield


def _call(op: str, device: str, **changes) -> Call:
    settings = {"dtype": torch.float16, "m": 1, "n": 8, "k": 64, "blocksize": 64, "codebook": "nf4"}
    return Call(op, device, **(settings | changes))


@pytest.mark.parametrize(("extra", "major"), [("cuda", 13), ("cuda12", 12)])
def test_an_extra_brings_cuda_python_and_the_nvrtc_of_the_same_cuda(extra: str, major: int):
    table = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    wanted = {Requirement(one).name: Requirement(one) for one in table["project"]["optional-dependencies"][extra]}
    nvrtc_name = "nvidia-cuda-nvrtc" if major == 13 else "nvidia-cuda-nvrtc-cu12"
    assert set(wanted) == {"cuda-python", nvrtc_name, "numpy"}
    for name in ("cuda-python", nvrtc_name):
        assert wanted[name].specifier.contains(f"{major}.9")
        assert not any(wanted[name].specifier.contains(f"{other}.9") for other in (11, 12, 13, 14) if other != major)


# --- what is missing --------------------------------------------------------------------------------------------------

# torch for CUDA is claimed, so that what comes after it is asked for; everything else is as it is on the machine.
ASK = """
import json, torch
torch.version.cuda = "13.0"
import refq4
try:
    refq4.set_backend("cuda")
except refq4.BackendUnavailableError as error:
    print(json.dumps([str(error), refq4.backend_info("cuda")["reason"]]))
"""


def reason(code: str = ASK, *options: str, **environment: str) -> str:
    """Why there is no CUDA here: what set_backend raises, and info tells."""
    raised, told = json.loads(python(code, *options, **environment).stdout)
    assert raised == f"backend 'cuda' is not available: {told}"
    assert "\n" not in told
    return told


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_with_torch_for_the_cpu_the_remedy_is_another_torch_or_the_emulator():
    told = reason(ASK.replace('torch.version.cuda = "13.0"', ""))
    assert told.startswith(f"torch {torch.__version__} is built without CUDA: install a build with CUDA from https")
    assert told.endswith("without a GPU, the backend cuda-emulator runs the same kernels")


def test_without_cuda_python_the_remedy_is_the_extra():
    told = reason("import sys; sys.modules['cuda'] = None\n" + ASK)
    assert told.startswith("cuda-python is not installed (")
    assert f"{remedies.install('cuda')}, or with [cuda12] for [cuda]" in told


def test_without_nvrtc_the_remedy_is_the_extra(tmp_path):
    for place in map(Path, site.getsitepackages()):  # the same packages, but for NVIDIA's libraries
        for entry in place.iterdir() if place.exists() else ():
            if entry.name != "nvidia" and not (tmp_path / entry.name).exists():
                (tmp_path / entry.name).symlink_to(entry)
    paths = [str(tmp_path), *(p for p in sys.path if p and Path(p).is_dir() and "site-packages" not in p)]
    told = reason(ASK, "-S", PYTHONPATH=os.pathsep.join(paths))
    assert told.startswith("NVRTC, which compiles the kernels, is not installed (")
    assert remedies.install("cuda") in told


def test_without_a_driver_the_remedy_is_a_driver_or_the_emulator(tmp_path):
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")  # found before a real one
    told = reason(LD_LIBRARY_PATH=str(tmp_path))
    assert told.startswith("there is no NVIDIA driver (Failed to dlopen libcuda.so.1): install one; without a GPU")


MACHINES = {
    "an old driver": (
        {"FAKE_CUDA_VERSION": "12040"},
        r"driver is too old \(it is for CUDA 12\.4, .* of CUDA 13\.\d\): update the driver, or pip install",
    ),
    "an old driver and no GPU": ({"FAKE_CUDA_VERSION": "12040", "FAKE_CUDA_DEVICES": "0"}, "driver is too old"),
    "no GPU": ({"FAKE_CUDA_DEVICES": "0"}, "finds no GPU: check nvidia-smi and .*VISIBLE_DEVICES; without a GPU"),
    "a broken driver": (
        {"FAKE_CUDA_INIT": "803"},
        r"does not start \(CUDA_ERROR_SYSTEM_DRIVER_MISM.*nvidia-smi",
    ),
    "a GPU that torch can't use": ({}, r"can't use the GPU that the driver \(CUDA 13\.0\) offers: update the driver"),
}


@pytest.fixture(scope="module")
def refusals(fake_driver: Path) -> dict[str, str]:
    """What the backend says on each of these machines, asked in one process."""
    code = f"""
import json, os, torch
torch.version.cuda = "13.0"
from refq4_cuda import CudaBackend
says = {{}}
for name, (machine, _) in {MACHINES!r}.items():
    for variable in ("FAKE_CUDA_VERSION", "FAKE_CUDA_DEVICES", "FAKE_CUDA_INIT"):
        os.environ[variable] = machine.get(variable, "")
    says[name] = CudaBackend().available()
print(json.dumps(says))
"""
    said: dict[str, str] = json.loads(python(code, LD_LIBRARY_PATH=str(fake_driver)).stdout)
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here, whatever the driver says")
@pytest.mark.parametrize("machine", MACHINES)
def test_a_driver_that_will_not_do_is_named_with_the_remedy(refusals, machine):
    assert re.search(MACHINES[machine][1], refusals[machine])
    assert "\n" not in refusals[machine]


def test_the_emulator_needs_nvrtc_but_neither_gpu_nor_driver(tmp_path):
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    code = "from refq4_cuda import CudaEmulatorBackend; print(CudaEmulatorBackend().available())"
    assert python(code, LD_LIBRARY_PATH=str(tmp_path)).stdout.strip() == "None"


def test_an_architecture_that_is_none_is_refused_by_the_name_of_the_variable(monkeypatch):
    monkeypatch.setenv(emulated.ARCH_VARIABLE, "sm_80")
    told = str(CudaEmulatorBackend().available())
    assert told.startswith(
        "the environment variable REFQ4_CUDA_EMULATOR_ARCH='sm_80' is not an architecture; known: 75, 80"
    )
    monkeypatch.setenv(emulated.ARCH_VARIABLE, "90")
    assert CudaEmulatorBackend().info()["architecture"] == "sm_90"


def test_a_cache_that_others_can_write_to_is_a_reason(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path))
    for backend in (CudaBackend(), CudaEmulatorBackend()):
        assert "writable by others" in str(backend.available())


# --- compiling --------------------------------------------------------------------------------------------------------

KERNEL = '#include "device.cuh"\nextern "C" __global__ void f(float *p) {\n    p[0] = twice(p[1]) * FACTOR;\n}\n'


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> Path:
    """A folder of kernels that is not ours, and an empty cache."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "device.cuh").write_text("__device__ float twice(float x) { return x + x; }\n")
    (folder / "f.cu").write_text(KERNEL)
    monkeypatch.setattr(nvrtc, "kernel_directory", lambda: folder)
    monkeypatch.setenv("REFQ4_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def variant(*defines: str, file: str = "f.cu") -> launch.Variant:
    return launch.Variant(file, "f", defines or ("FACTOR=3",))


def test_a_variant_becomes_a_cubin_with_its_log_or_ptx(kernels, capfd):
    cubin, ptx = nvrtc.compile_variant(variant(), 90), nvrtc.compile_variant(variant(), 90, "ptx")
    assert cubin.data.startswith(b"\x7fELF")
    assert "Used" in cubin.log
    assert "registers" in cubin.log
    assert ".target sm_90" in ptx.data.decode()
    assert ".entry f(" in ptx.data.decode()
    assert cubin.path.read_bytes() == cubin.data
    told = r"compiling f\.cu \(FACTOR=3\) for sm_90 \(once, about a second\) \.\.\. \d+\.\d s"
    assert len(re.findall(told, capfd.readouterr().err)) == 2


def test_the_second_time_nothing_is_compiled_not_even_in_another_process(kernels, capfd):
    first = nvrtc.compile_variant(variant(), 90)
    capfd.readouterr()
    assert nvrtc.compile_variant(variant(), 90) == first
    code = f"""
from pathlib import Path
from refq4_cuda import launch, nvrtc
nvrtc.kernel_directory = lambda: Path({str(kernels)!r})
print(nvrtc.compile_variant(launch.Variant("f.cu", "f", ("FACTOR=3",)), 90).path)
"""
    other = python(code)
    assert other.stdout.strip() == str(first.path)
    assert "compiling" not in other.stderr + capfd.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".log", ".sha256"])
def test_a_damaged_file_is_compiled_again(kernels, suffix, capfd):
    first = nvrtc.compile_variant(variant(), 90)
    damaged = Path(f"{first.path}{suffix}")
    damaged.write_bytes(damaged.read_bytes()[:20])
    capfd.readouterr()
    assert nvrtc.compile_variant(variant(), 90).data == first.data
    assert "registers" in nvrtc.compile_variant(variant(), 90).log
    assert capfd.readouterr().err.count("compiling") == 1


def test_the_key_depends_on_source_header_macros_flags_architecture_and_form(kernels, monkeypatch):
    paths = [nvrtc.compile_variant(variant(), 90).path, nvrtc.compile_variant(variant(), 80).path]
    paths += [nvrtc.compile_variant(variant("FACTOR=4"), 90).path, nvrtc.compile_variant(variant(), 90, "ptx").path]
    monkeypatch.setenv(nvrtc.FLAGS_VARIABLE, "-lineinfo")
    paths += [nvrtc.compile_variant(variant(), 90).path]
    monkeypatch.delenv(nvrtc.FLAGS_VARIABLE)
    (kernels / "device.cuh").write_text("__device__ float twice(float x) { return 2 * x; }\n")
    paths += [nvrtc.compile_variant(variant(), 90).path]
    (kernels / "f.cu").write_text(KERNEL + "// changed\n")
    paths += [nvrtc.compile_variant(variant(), 90).path]
    assert len(set(paths)) == 7


def test_subnormals_and_correct_division_are_kept(kernels):
    (kernels / "f.cu").write_text('extern "C" __global__ void f(float *p) { p[0] = p[1] / p[2]; }')
    ptx = nvrtc.compile_variant(variant(), 90, "ptx").data.decode()
    assert "div.rn.f32" in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"twice(p": "thrice(p"},
            ['f.cu(3): error: identifier "thrice" is undefined', "p[0] = thrice(p[1]) * FACTOR;"],
        ),
        ({"p[0]": 'asm("add.f7 %0;" ::"r"(1)); p[0]'}, ["PTX line ", "'.f7'", "add.f7 "]),
    ],
    ids=["C++", "inline PTX"],
)
def test_an_error_quotes_the_line_and_tells_options_and_remedy(kernels, change, says, capfd):
    ((old, new),) = change.items()
    (kernels / "f.cu").write_text(KERNEL.replace(old, new))
    with pytest.raises(nvrtc.CompileError) as failure:
        nvrtc.compile_variant(variant(), 90)
    wanted = ["compiling f.cu for sm_90 failed:\n", *says, "--gpu-architecture=sm_90", "-DFACTOR=3", "REFQ4_CUDA_FLAGS"]
    for words in wanted:
        assert words in str(failure.value)
    assert "warning" not in str(failure.value)
    assert "... failed" in capfd.readouterr().err


def test_a_source_that_nvrtc_refused_is_not_compiled_again(kernels, capfd):
    (kernels / "f.cu").write_text(KERNEL.replace("twice(p", "thrice(p"))
    messages = []
    for _ in range(2):
        with pytest.raises(nvrtc.CompileError) as failure:
            nvrtc.compile_variant(variant(), 90)
        messages.append(str(failure.value))
    assert messages[0] == messages[1]
    assert capfd.readouterr().err.count("compiling") == 1
    (kernels / "f.cu").write_text(KERNEL)
    assert nvrtc.compile_variant(variant(), 90).data, "another source is another compile"


def test_what_nvrtc_or_the_package_lacks_is_named(kernels, monkeypatch):
    with pytest.raises(
        nvrtc.CompileError, match=r"NVRTC 13\.\d does not compile for sm_20, only for 75, 80, .*pip install"
    ):
        nvrtc.compile_variant(variant(), 20)
    with pytest.raises(nvrtc.CompileError, match=r"no kernel file 'g\.cu'; known: f\.cu"):
        nvrtc.compile_variant(variant(file="g.cu"), 90)
    monkeypatch.setenv(nvrtc.FLAGS_VARIABLE, "--no-such-option")
    with pytest.raises(nvrtc.CompileError, match="unrecognized option --no-such-option"):
        nvrtc.compile_variant(variant(), 90)


def test_the_cache_refuses_a_shared_directory(kernels, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(CacheError, match="chmod go-w"):
        nvrtc.compile_variant(variant(), 90)


# --- launching --------------------------------------------------------------------------------------------------------

# torch for the CPU has no streams to ask for; 0x55 is the current one of cuda:0, and 0x56 of cuda:1. Importing torch
# takes longer than all that is asked here, so one process does it and forks before each story: a story meets a driver
# that nobody has spoken to.
STORYTELLER = """
import json, os, sys, torch
torch._C._cuda_getCurrentRawStream = lambda index: 0x55 + index
from refq4.backend import PackedWeight
from refq4.codebooks import get_codebook
from refq4_cuda import bindings, driver, launch
code = get_codebook("nf4").on("cpu").values
weight = PackedWeight(torch.zeros(32, dtype=torch.uint8), torch.ones(1), code, 64, (1, 64), "nf4")
for name, (environment, story) in json.load(sys.stdin).items():
    if os.fork():
        status = os.waitstatus_to_exitcode(os.wait()[1])
        assert status == 0, f"{name}: exit status {status}"
        continue
    os.environ.update(environment, FAKE_CUDA_LOG=f"{sys.argv[1]}/{name}.log")
    open(f"{sys.argv[1]}/{name}.log", "w").close()
    sys.stdout = open(f"{sys.argv[1]}/{name}.out", "w")
    gpu = driver.device(0)
    (plan,) = launch.dequantize_4bit(weight, torch.empty(1, 64), gpu.arch)
    exec(story)
    sys.stdout.flush()
    os._exit(0)
"""
STORIES: dict[str, tuple[dict[str, str], str]] = {
    "plain": (
        {},
        """
gpu.run([plan, plan])
gpu.run([plan._replace(shared=100 << 10)])
gpu.run([plan._replace(shared=90 << 10)])
print(json.dumps([plan.arguments.hex(), plan.grid, plan.block, gpu.arch, gpu.multiprocessors]))
""",
    ),
    "two devices": (
        {"FAKE_CUDA_DEVICES": "2"},
        """
bindings.driver_bindings().cuCtxPushCurrent(gpu._context)
gpu.run([plan])
driver.device(1).run([plan])
""",
    ),
    "a GB10": (
        {"FAKE_CUDA_ARCH": "121", "FAKE_CUDA_SHARED": "99"},
        """
from refq4_cuda import CudaBackend
from refq4.backend import Call
x, y = torch.empty(16, 64).bfloat16(), torch.empty(16, 1).bfloat16()
CudaBackend.processor = lambda self, device: gpu
backend, wanted = CudaBackend(), Call("gemm_4bit", "cuda", torch.bfloat16, 16, 1, 64, 64, "nf4")
gpu.run(launch.product(x, weight, None, y, gpu.arch, gpu.multiprocessors, limits=gpu.limits))
print(json.dumps([gpu.arch, gpu.limits, backend.can_run(wanted), backend.kernel(wanted)]))
""",
    ),
    "a GPU of tomorrow": (
        {"FAKE_CUDA_ARCH": "999"},
        """
from refq4_cuda import CudaBackend
from refq4.backend import Call
CudaBackend.processor = lambda self, device: gpu
print(CudaBackend().can_run(Call("gemm_4bit", "cuda", torch.bfloat16, 16, 1, 64, 64, "nf4")))
""",
    ),
    "a GPU with little room": (
        {"FAKE_CUDA_REGISTERS": "8192"},
        """
import refq4
from refq4 import registry
from refq4.backend import Call
from refq4_cuda import CudaBackend
class Small(CudaBackend):
    name, devices, priority = "small", ("cpu",), 100
    def available(self):
        return None
    def processor(self, device):
        return gpu
refq4.register_backend(Small())
wanted = Call("gemm_4bit", "cpu", torch.bfloat16, 16, 1, 64, 64, "nf4")
found = registry.resolve(wanted, "auto")
print(json.dumps([Small().can_run(wanted), found.backend.name, dict(found.passed_over).get("small")]))
""",
    ),
    "a GPU of yesterday": (
        {"FAKE_CUDA_ARCH": "61"},
        """
from refq4_cuda import CudaBackend
from refq4.backend import Call
CudaBackend.processor = lambda self, device: gpu
print(CudaBackend().can_run(Call("gemm_4bit", "cuda", torch.bfloat16, 16, 1, 64, 64, "nf4")))
""",
    ),
    "a failure": (
        {"FAKE_CUDA_LAUNCH": "700"},
        """
try:
    gpu.run([plan])
except bindings.CudaError as error:
    print(error)
""",
    ),
    "a capture": (
        {"FAKE_CUDA_DEVICES": "2"},
        """
os.environ["FAKE_CUDA_CAPTURING"] = str(0x56)
gpu.run([plan])
try:
    driver.device(1).run([plan])
except bindings.CudaError as error:
    print(error)
os.environ["FAKE_CUDA_CAPTURING"] = ""
driver.device(1).run([plan])
os.environ["FAKE_CUDA_CAPTURING"] = str(0x56)
driver.device(1).run([plan])
""",
    ),
}


@pytest.fixture(scope="module")
def told(fake_driver: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], str]]:
    """For each story, what the driver was asked, and what was printed."""
    folder = tmp_path_factory.mktemp("stories")
    done = subprocess.run(
        [sys.executable, "-c", STORYTELLER, str(folder)],
        input=json.dumps(STORIES),
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(fake_driver)},
        timeout=BUSY,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: ((folder / f"{name}.log").read_text().splitlines(), (folder / f"{name}.out").read_text())
        for name in STORIES
    }


def test_a_launch_is_the_plan_on_torchs_stream_in_the_devices_context(told):
    log, out = told["plain"]
    arguments, grid, block, arch, multiprocessors = json.loads(out)
    assert (arch, multiprocessors) == (90, 132)
    sizes = f"{','.join(map(str, grid))} {','.join(map(str, block))}"
    plain, large, smaller = (
        f"launch {sizes} {shared} stream 55 in 100 {arguments}" for shared in (0, 100 << 10, 90 << 10)
    )
    cleared = [f"allocate {1 << 20}", f"set 100000 {1 << 20} x 0", "synchronize 0"]
    first = ["push 100", "load ELF", "function dequantize", *cleared, plain, plain, "pop"]
    assert log == [*first, "push 100", f"attribute 8 = {100 << 10}", large, "pop", "push 100", smaller, "pop"]


def test_a_context_that_is_current_is_left_alone_and_each_device_loads_its_own(told):
    log, _ = told["two devices"]
    names = [line.split()[0] for line in log]
    once = ["push", "load", "function", "allocate", "set", "synchronize", "launch"]
    assert names == [*once, *once, "pop"]
    assert [line.partition(" in ")[2][:3] for line in log if line.startswith("launch")] == ["100", "101"]


def test_a_plan_fits_into_what_the_device_says_it_has(told):
    log, out = told["a GB10"]
    assert json.loads(out) == [121, [99 << 10, 100 << 10, 65536], None, "gemm_4bit_4_ring"]
    (asked,) = [int(line.split("= ")[1]) for line in log if line.startswith("attribute 8")]
    assert asked == 69632 <= 99 << 10


def test_a_device_that_nothing_can_be_compiled_for_is_a_reason_and_auto_goes_on(told):
    assert told["a GPU of tomorrow"][1].startswith("NVRTC 13.0 does not compile for sm_999, only for 75, 80, 86")
    assert told["a GPU of yesterday"][1].startswith("the GPU is an sm_61, and the kernels need sm_75 (Turing) or newer")


def test_a_device_that_no_plan_fits_into_is_a_reason_and_auto_goes_on(told):
    refused, taken, passed_over = json.loads(told["a GPU with little room"][1])
    assert refused == passed_over == "the kernels need 32768 registers in a CTA, and the device has 8192"
    assert taken in ("cpu", "reference")


def test_a_failed_launch_says_which_kernel_and_that_an_earlier_one_may_be_at_fault(told):
    log, out = told["a failure"]
    assert out.startswith("launching dequantize of dequantize.cu (T_FP32) on cuda:0 (sm_90) failed: an illegal memory")
    assert "(CUDA_ERROR_ILLEGAL_ADDRESS); grid (1, 1, 1)" in out
    assert "CUDA_LAUNCH_BLOCKING=1" in out
    assert log[-1] == "pop"


def test_a_kernel_met_first_in_a_capture_is_refused_and_one_met_before_is_launched(told):
    log, out = told["a capture"]
    assert "not loaded on cuda:1 yet" in out, "cuda:0 is torch's current device, and captures nothing"
    assert "run the same call once before the capture" in out
    assert [line.split(" stream ")[1][:2] for line in log if line.startswith("launch")] == ["55", "56", "56"]


def test_more_arguments_than_a_kernel_takes_are_refused_before_they_are_copied():
    from refq4_cuda.driver import _Scratch

    with pytest.raises(RuntimeError, match="5000 bytes of arguments: a kernel takes 4096 at most"):
        _Scratch().holding(bytes(5000))


# --- the backend, end to end, on the emulator -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "nested", "kernel"),
    [
        (1, 16, 128, torch.float32, False, "gemv_4bit_2_vectorised"),
        (1, 16, 128, torch.bfloat16, True, "gemm_4bit_4_ring"),
        (9, 33, 256, torch.float16, True, "gemm_4bit_4_ring"),
        (2, 5, 65, torch.float32, True, "gemv_4bit_1_naive"),
        (513, 7, 128, torch.bfloat16, True, "dequantize + torch.matmul"),
    ],
    ids=[
        "one token, fp32",
        "one token, bf16",
        "nine tokens, fp16",
        "blocks that straddle rows",
        "above the cross-over",
    ],
)
def test_a_layer_on_the_emulator_is_the_references_and_the_trace_says_who_ran(m, n, k, dtype, nested, kernel):
    refq4.set_backend("cuda-emulator")
    layer = refq4.nn.Linear4bit(k, n, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
    layer = layer.to("cpu").eval()
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(4)).to(dtype)
    with refq4.trace() as t, torch.no_grad():
        y = layer(x)
    ran = [(op.backend, op.kernel) for call in t.calls for step in call.steps for op in step.ops]
    assert ran == [("cuda-emulator", kernel)]
    with refq4.use_backend("reference"), torch.no_grad():
        wanted = layer(x)
    # Sums in another order: a few roundings of the largest result. The catalogue below has the exact budget.
    torch.testing.assert_close(y, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps * float(wanted.abs().max()))


# Turing has a path of its own. From sm_80 on the kernels' source is one; what the compiler makes of it for other
# architectures is met pair by pair in test_cuda_emulator_kernels.py.
@pytest.mark.parametrize(
    "arch",
    [75, 80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, 100))],
    ids="sm_{}".format,
)
def test_the_emulated_backend_answers_the_quick_catalogue_as_the_reference_does(arch, monkeypatch):
    monkeypatch.setenv(emulated.ARCH_VARIABLE, str(arch))
    report = refq4.testing.verify("cuda-emulator", depth="quick", progress=False)
    assert report.agrees, str(report)
    for check in report.checks:
        assert not check.refused
        assert check.same == 40, check.name


def test_gpu_and_emulator_share_every_op():
    for backend in (CudaBackend, CudaEmulatorBackend):
        assert not {*OPS, "can_run", "kernel"} & set(vars(backend))
        assert backend().missing_op(_call(OPS[0], "cpu")) is None


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 64), (3, 8, 0), (3, 0, 64)], ids=["no token", "no K", "no N"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_product_of_nothing_launches_nothing_and_gives_the_bias(m, n, k, bias):
    weight = PackedWeight(torch.empty(0, dtype=torch.uint8), torch.empty(0), CODE.values, 64, (n, k), "nf4")
    b = torch.arange(n, dtype=torch.float32) if bias else None
    y = CudaEmulatorBackend().gemm_4bit(torch.ones(m, k), weight, b)
    assert torch.equal(y, torch.zeros(m, n) if b is None else b.expand(m, n))


def test_a_code_of_fewer_than_256_values_is_enough_for_the_8_bit_stage():
    q = torch.arange(16, dtype=torch.uint8).repeat(5)
    decoded = CudaEmulatorBackend().dequantize_blockwise(q, torch.tensor([2.0, 3.0]), CODE.values, 64, torch.float32)
    assert torch.equal(decoded, CODE.values[q.int()] * torch.tensor([2.0, 3.0]).repeat_interleave(64)[:80])


def test_tensors_of_nothing_are_quantised_and_decoded_to_nothing():
    backend = CudaEmulatorBackend()
    packed, absmax = backend.quantize_4bit(torch.empty(0), CODE, 64)
    q, _ = backend.quantize_blockwise(torch.empty(0, 3), CODE, 64)
    weight = PackedWeight(packed, absmax, CODE.values, 64, (0, 64), "nf4")
    assert (packed.numel(), absmax.numel(), q.shape) == (0, 0, (0, 3))
    assert backend.dequantize_4bit(weight, torch.float16).shape == (0, 64)
    assert backend.dequantize_blockwise(q, absmax, CODE.values, 64, torch.float32).shape == (0, 3)


@pytest.mark.parametrize("blocksize", [64, 100])
@pytest.mark.parametrize("op", OPS)
def test_the_kernel_that_the_trace_names_is_the_one_that_runs(op, blocksize, monkeypatch):
    ran: list[str] = []
    run = emulated.Emulated.run
    monkeypatch.setattr(
        emulated.Emulated,
        "run",
        lambda self, plan: (ran.extend(Path(p.variant.file).stem for p in plan), run(self, plan)),
    )
    backend, A, q = CudaEmulatorBackend(), torch.randn(4, 200).half(), torch.zeros(4, 200, dtype=torch.uint8)
    packed, absmax = backend.quantize_4bit(A, CODE, blocksize)
    weight, m = PackedWeight(packed, absmax, CODE.values, blocksize, (4, 200), "nf4"), 1 if op == "gemv_4bit" else 3
    ran.clear()
    {
        "quantize_4bit": lambda: backend.quantize_4bit(A, CODE, blocksize),
        "dequantize_4bit": lambda: backend.dequantize_4bit(weight, A.dtype),
        "quantize_blockwise": lambda: backend.quantize_blockwise(A, CODE, blocksize),
        "dequantize_blockwise": lambda: backend.dequantize_blockwise(q, absmax, CODE.values, blocksize, A.dtype),
        "gemv_4bit": lambda: backend.gemv_4bit(A[:m], weight, None),
        "gemm_4bit": lambda: backend.gemm_4bit(A[:m], weight, None),
    }[op]()
    product = op in ("gemv_4bit", "gemm_4bit")
    sizes = {"m": m, "n": 4, "k": 200} if product else {"m": 1, "n": 1, "k": 800}
    assert backend.kernel(_call(op, "cpu", blocksize=blocksize, **sizes)) == " + ".join(dict.fromkeys(ran))


def test_what_the_backend_does_not_take_it_says():
    backend = CudaEmulatorBackend()
    assert backend.can_run(_call("gemv_4bit", "cpu")) is None
    assert "does not compute in torch.float64" in str(backend.can_run(_call("gemv_4bit", "cpu", dtype=torch.float64)))
    assert "canonical and stored, not tiles16" in str(backend.can_run(_call("gemv_4bit", "cpu", layout="tiles16")))
    assert "computes on cpu, and the tensors are on cuda" in str(backend.can_run(_call("gemv_4bit", "cuda")))
    prepared = PreparedWeight("cpu", "tiles16", (), (8, 64), 64, "nf4")
    with pytest.raises(refq4.BackendUnsupportedError, match="reads the layouts canonical and stored, not 'tiles16'"):
        backend.gemm_4bit(torch.ones(2, 64), prepared, None)
