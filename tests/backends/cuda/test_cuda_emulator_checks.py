"""What the emulator refuses, each with a kernel of a few lines, and beside it what goes through."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("refq4_cuda", reason="the package refq4_cuda is not installed: pip install -e .")
from ptx import kernel, run
from refq4_cuda import emulator
from refq4_cuda.emulator import decode
from refq4_cuda.emulator.parse import parse
from refq4_cuda.launch import Launch

# --- memory, barriers, copies: what goes through ----------------------------------------------------------------------

TO_ROOM = "mov.u64 %rd1, room; mul.wide.s32 %rd2, %r0, 4; add.s64 %rd3, %rd1, %rd2; add.s64 %rd4, %at0, %rd2;"


def test_a_word_in_shared_memory_reaches_another_warp_across_a_barrier():
    out = torch.zeros(64, dtype=torch.int32)
    body = TO_ROOM + "st.shared.u32 [%rd3], %r0; bar.sync 0; xor.b32 %r2, %r0, 32; mul.wide.s32 %rd5, %r2, 4;"
    body += "add.s64 %rd5, %rd1, %rd5; ld.shared.u32 %r3, [%rd5]; st.global.u32 [%rd4], %r3;"
    for seed in (None, 1, 2):
        emulator.run(*kernel(body, out.zero_(), threads=64), seed=seed)
        assert out.tolist() == [i ^ 32 for i in range(64)]


def test_cp_async_fills_the_rest_with_zeros_and_arrives_with_the_wait():
    source, out = torch.arange(1, 129, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    body = (
        "mov.u64 %rd1, room; mul.wide.s32 %rd2, %r0, 16; add.s64 %rd3, %rd1, %rd2; add.s64 %rd4, %at0, %rd2;"
        "add.s64 %rd5, %at1, %rd2; and.b32 %r2, %r0, 3; shl.b32 %r2, %r2, 2; cvt.u32.u64 %r3, %rd3;"
        "cp.async.cg.shared.global [%r3], [%rd4], 16, %r2; cp.async.commit_group; cp.async.wait_group 0;"
        "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3]; st.global.v4.u32 [%rd5], {%r4, %r5, %r6, %r7};"
    )
    run(body, source, out)
    wanted = source.view(32, 4).clone()
    for lane in range(32):
        wanted[lane, lane % 4 :] = 0
    assert torch.equal(out.view(32, 4), wanted)


def test_a_branch_that_half_a_warp_takes_rejoins_before_the_shuffle():
    out = torch.zeros(32, dtype=torch.int32)
    body = TO_ROOM + "setp.lt.s32 %p1, %r0, 16; mov.u32 %r2, 5; @%p1 bra LOW; mov.u32 %r2, 7;\nLOW:\n"
    body += "shfl.sync.bfly.b32 %r3|%p2, %r2, 16, 31, -1; st.global.u32 [%rd4], %r3;"
    run(body, out)
    assert out.tolist() == [7] * 16 + [5] * 16


def test_atomics_of_many_threads_add_up_and_each_sees_another_count():
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    body = "mul.wide.s32 %rd2, %r0, 4; add.s64 %rd4, %at1, %rd2; atom.global.add.u32 %r2, [%at0], 1;"
    run(body + "st.global.u32 [%rd4], %r2;", counter, out, threads=64, blocks=4)
    assert counter.item() == 256
    assert sorted(out.tolist()) == list(range(256))


def test_a_block_reads_what_another_wrote_before_its_barrier_and_its_atomic():
    memory = torch.zeros(32, dtype=torch.int32)
    run(COUNTED_IN.format(barrier="bar.sync 0;"), memory, threads=64, blocks=2)
    assert (memory[0].item(), memory[1].item()) == (2, 1)


def test_a_report_counts_instructions_per_thread():
    report = run("add.s32 %r2, %r0, 1;", threads=48, blocks=3)
    assert (report.kernel, report.blocks, report.opcodes["add.s32"]) == ("hand", 3, 144)
    assert report.instructions == sum(report.opcodes.values())


# --- what it refuses --------------------------------------------------------------------------------------------------

STORE = "st.shared.u32 [%rd3], %r0;"
# thread 1 of block 0 writes, threads 0 of both blocks count them in, and block 1 reads
COUNTED_IN = (
    "setp.eq.s32 %p1, %r0, 1; @%p1 st.global.u32 [%at0+64], %r0; {barrier} and.b32 %r2, %r0, 63; "
    "setp.eq.s32 %p2, %r2, 0; @%p2 atom.global.add.u32 %r3, [%at0], 1; setp.eq.s32 %p3, %r0, 64; "
    "@%p3 ld.global.u32 %r4, [%at0+64]; @%p3 st.global.u32 [%at0+4], %r4;"
)
REFUSED = {
    "a read past the end of a tensor": (
        emulator.AccessError, r"reads 4 bytes at byte 128 of int32 \[32\] \(128 bytes\), outside every buffer",
        "mul.wide.s32 %rd2, %r0, 4; add.s64 %rd4, %at0, %rd2; ld.global.u32 %r2, [%rd4+4];",
    ),
    "an address that wrapped in 32 bits": (
        emulator.AccessError, "outside every buffer",
        "cvt.u32.u64 %r2, %at0; cvt.u64.u32 %rd1, %r2; ld.global.u32 %r2, [%rd1];",
    ),
    "a vector at an odd address": (
        emulator.AccessError, "not a multiple of 16",
        "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%at0+4];",
    ),
    "a shared address past the end": (
        emulator.AccessError, "shared bytes at 1024, outside its 1024 bytes",
        TO_ROOM + "ld.shared.u32 %r2, [%rd1+1024];",
    ),
    "a shared vector at an odd address": (
        emulator.AccessError, "not a multiple of 8", TO_ROOM + "ld.shared.v2.u32 {%r2, %r3}, [%rd1+4];",
    ),
    "a shared word that nobody wrote": (
        emulator.UninitialisedError, "reads shared byte 0, which nobody has written",
        TO_ROOM + "ld.shared.u32 %r2, [%rd3];",
    ),
    "a register that one branch did not set": (
        emulator.UninitialisedError, "reads register %r2, which it has not written",
        "setp.lt.s32 %p1, %r0, 16; @%p1 mov.u32 %r2, 5; add.s32 %r3, %r2, 1;",
    ),
    "a predicate that one branch did not set": (
        emulator.UninitialisedError, "reads register %p2, which it has not written",
        "setp.lt.s32 %p1, %r0, 16; @%p1 setp.eq.s32 %p2, %r0, 3; @%p2 bra OUT;\nOUT:\n",
    ),
    "a copy that was not waited for": (
        emulator.UninitialisedError, "which cp.async is still filling",
        TO_ROOM + "cvt.u32.u64 %r3, %rd1; setp.eq.s32 %p1, %r0, 0; @%p1 cp.async.cg.shared.global [%r3], [%at0], 16; "
        "cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r2, [%rd1];",
    ),
    "a copy that only the copying lane has waited for": (
        emulator.RaceError, "written by thread 0 with no barrier between",
        TO_ROOM + "cvt.u32.u64 %r3, %rd1; setp.eq.s32 %p1, %r0, 0; @%p1 cp.async.cg.shared.global [%r3], [%at0], 16; "
        "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r2, [%rd1];",
    ),
    "a neighbour's word read with no barrier": (
        emulator.RaceError, r"missing __syncwarp\(\)",
        TO_ROOM + STORE + "xor.b32 %r2, %r0, 1; mul.wide.s32 %rd5, %r2, 4; add.s64 %rd5, %rd1, %rd5;"
        "ld.shared.u32 %r3, [%rd5];",
    ),
    "another warp's word after a mere __syncwarp": (
        emulator.RaceError, r"The other access: PTX line \d+:  st\.shared\.u32 .*\n.*missing __syncthreads\(\)",
        TO_ROOM + STORE + "bar.warp.sync -1; xor.b32 %r2, %r0, 32; mul.wide.s32 %rd5, %r2, 4; add.s64 %rd5, %rd1, %rd5;"
        "ld.shared.u32 %r3, [%rd5];",
    ),
    "a word overwritten while another thread may still read it": (
        emulator.RaceError, r"writes shared byte 0, read by thread[\s\S]*The other access: PTX line \d+:  ld\.shared",
        TO_ROOM + STORE + "bar.sync 0; ld.shared.u32 %r3, [%rd1]; setp.eq.s32 %p1, %r0, 40;"
        "@%p1 st.shared.u32 [%rd1], %r0;",
    ),
    "two lanes that write one word": (
        emulator.RaceError, "and another thread writes there too, in the same instruction",
        TO_ROOM + "st.shared.u32 [%rd1], %r0;",
    ),
    "two threads that write one word of a tensor": (
        emulator.RaceError, r"writes byte 0 of int32 .*, and another thread writes there too",
        "st.global.u32 [%at0], %r0;",
    ),
    "a word that another block wrote, with no atomics between": (
        emulator.RaceError, "written by thread 0 of block number 1 with no atomic of both between",
        "mov.u32 %r2, %ctaid.x; setp.eq.s32 %p1, %r2, 1; setp.eq.s32 %p2, %r0, 64; @%p2 st.global.u32 [%at0], %r0;"
        "@!%p1 ld.global.u32 %r3, [%at0];",
    ),
    "a word of a block whose other thread counted it in too early": (
        emulator.RaceError, "written by thread 1 of block number 0 with no atomic of both between",
        COUNTED_IN.format(barrier=""),
    ),
    "a barrier that half of the threads take": (
        emulator.ConvergenceError, "waits with 15 others of its block",
        "setp.lt.s32 %p1, %r0, 16; @!%p1 bra OUT; bar.sync 0;\nOUT:\n",
    ),
    "a barrier after some threads have returned": (
        emulator.ConvergenceError, r"48 thread\(s\): has returned", "setp.lt.s32 %p1, %r0, 16; @!%p1 ret; bar.sync 0;",
    ),
    "a shuffle whose mask leaves the lane out": (
        emulator.ConvergenceError, "mask 0x0000ffff, which leaves it out",
        "shfl.sync.bfly.b32 %r3|%p2, %r0, 16, 31, 65535;",
    ),
    "a shuffle that waits for lanes which have returned": (
        emulator.ConvergenceError, "asks lane 16 for its value, which takes no part",
        "setp.lt.s32 %p1, %r0, 16; @!%p1 ret; shfl.sync.bfly.b32 %r3|%p2, %r0, 16, 31, -1;",
    ),
    "an mma inside a branch": (
        emulator.ConvergenceError, "waits with 15 others of its warp",
        "mov.u32 %r2, 0; mov.f32 %f0, 0f00000000; setp.lt.s32 %p1, %r0, 16; @!%p1 bra OUT; "
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f0, %f0, %f0}, {%r2, %r2}, {%r2}, "
        "{%f0, %f0, %f0, %f0};\nOUT:\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what):
    kind, message, body = REFUSED[what]
    sizes = {"threads": 32 if kind is emulator.AccessError else 64, "blocks": 1 + ("block" in what)}
    with pytest.raises(kind, match=message) as caught:
        run(body, torch.zeros(32, dtype=torch.int32), **sizes)
    text = str(caught.value)
    assert "kernel hand, PTX line" in text
    assert re.search(r"block \([01], 0, 0\), thread \d", text)
    assert "ook" in text.splitlines()[-1], "the last line says what to look at"


def test_without_checks_it_lets_races_pass_but_not_accesses_outside():
    race, outside = (
        REFUSED[what][2] for what in ("a neighbour's word read with no barrier", "a read past the end of a tensor")
    )
    emulator.run(*kernel(race, torch.zeros(32, dtype=torch.int32)), checks=False)
    with pytest.raises(emulator.AccessError):
        emulator.run(*kernel(outside, torch.zeros(32, dtype=torch.int32)), checks=False)


def test_a_loop_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr("refq4_cuda.emulator.schedule.LIMIT", 100)
    with pytest.raises(emulator.RunawayError, match="is still running"):
        run("\nLOOP:\nadd.s32 %r2, %r0, 1; bra LOOP;")


@pytest.mark.parametrize(
    "instruction",
    ["vadd4.u32.u32.u32 %r2, %r0, %r0, %r1;", "ld.global.v16.u32 %r2, [%at0];", "sin.approx.f64 %f1, %f0;"],
)
def test_an_instruction_outside_its_tables_is_named_with_its_line(instruction):
    with pytest.raises(emulator.UnknownInstructionError) as caught:
        run(instruction, torch.zeros(4))
    line = next(
        i for i, text in enumerate(kernel(instruction, torch.zeros(4))[0].splitlines(), 1) if instruction in text
    )
    assert f"PTX line {line}: the emulator does not know {instruction.split()[0]!r}" in str(caught.value)


def test_a_launch_that_does_not_fit_the_kernel_is_refused():
    text, launch = kernel("", torch.zeros(4))
    with pytest.raises(emulator.LaunchError, match="takes 8 bytes of arguments, the launch has 12"):
        emulator.run(text, Launch(launch.variant, (1, 1, 1), (32, 1, 1), 0, b"\0" * 12, ()))
    with pytest.raises(emulator.LaunchError, match="no device runs grid"):
        emulator.run(text, Launch(launch.variant, (1, 1, 1), (2048, 1, 1), 0, launch.arguments, ()))
    with pytest.raises(emulator.LaunchError, match="has no kernel 'other'; it has: hand"):
        parse(text, "other")


def test_a_kernel_is_prepared_once_per_text():
    text, launch = kernel("add.s32 %r2, %r0, 1;")
    decode.prepare.cache_clear()
    emulator.run(text, launch)
    emulator.run(text, launch)
    assert decode.prepare.cache_info()[:2] == (1, 1)


# --- the trace --------------------------------------------------------------------------------------------------------


def test_a_trace_shows_what_one_thread_read_and_wrote():
    text, launch = kernel(
        "add.s32 %r2, %r0, 40; cvt.f32.f16 %f1, %h1;".replace(
            "cvt.f32.f16 %f1, %h1;", "mov.f32 %f1, 0f3F800000; add.f32 %f2, %f1, %f1;"
        ),
        threads=64,
    )
    shown = emulator.trace(text, launch, thread=(0, 2))
    (line,) = shown.find("add.s32")
    assert (line.reads, line.writes) == ("%r0 = 2", "%r2 = 42")
    assert shown.find("add.f32")[0].writes == "%f2 = 2"
    assert "add.s32 %r2, %r0, 40" in str(shown)
    assert "add.s32" in shown._repr_html_()


def test_a_trace_of_a_warp_shows_all_its_lanes_and_stops_at_the_limit():
    text, launch = kernel("add.s32 %r2, %r0, 1;", threads=64)
    (line,) = emulator.trace(text, launch, warp=(0, 1)).find(r"add\.s32")
    assert line.writes == f"%r2 = [{' '.join(str(i + 1) for i in range(32, 64))}]"
    short = emulator.trace(text, launch, warp=(0, 1), limit=2)
    assert (len(short.lines), short.left_out) == (2, 3)
    assert "3 more instructions" in str(short)
    with pytest.raises(ValueError, match="either thread"):
        emulator.trace(text, launch)
    with pytest.raises(ValueError, match="1 blocks of 64 threads"):
        emulator.trace(text, launch, thread=(1, 0))
