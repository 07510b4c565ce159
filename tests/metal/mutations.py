"""Faults, each of which the tests of the Metal kernels have to notice.

    python tests/metal/mutations.py [NAME ...]

puts one fault after the other into a shader, a launch plan or the Objective-C++, runs the tests of metal/hosted with it
(under the race detector), prints whether they failed, and exits with 1 if they did not. A fault is a change of the text
of one file; the files themselves stay as they are.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torch_tqattn"
# Names the fault under which the double runs.
VARIABLE = "TQATTN_METAL_MUTATION"
TESTS = ["tests/test_kernels.py", "tests/metal/hosted/suite.py"]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutation:
    """`old`, which is in the file once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    @property
    def path(self) -> Path:
        return PACKAGE / self.file

    @property
    def is_of_shader(self) -> bool:
        return self.file.startswith("shaders/")

    def mutated(self) -> str:
        """The text of the file with the fault. ValueError if there is no place for it, or more than one."""
        text = self.path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times {self.old!r}, expected one")
        return text.replace(self.old, self.new)


_ATTEND, _ENCODE, _REDUCE = "shaders/attend.metal", "shaders/encode.metal", "shaders/reduce.metal"
_ENCODE_H = "shaders/encode.h"
_DECODE, _STORE, _ROW, _STATE = "shaders/decode.metal", "shaders/store.h", "shaders/row.h", "shaders/state.h"
_VISIBLE = "shaders/visible.h"
_CODES, _PLAN, _LAUNCH, _PIPELINE = "shaders/codes.h", "csrc/gpu/plan.cpp", "csrc/mps/encode.mm", "csrc/mps/pipeline.mm"

MUTATIONS = [
    # Every barrier of every shader.
    Mutation(
        "no barrier between handing a state over and taking it",
        _ATTEND,
        f"{BARRIER}\n    if (simdgroup < half_count)",
        "if (simdgroup < half_count)",
    ),
    Mutation(
        "no barrier before the scratch is used again",
        _ATTEND,
        f"TQ_STATE_FLOATS, lane, states);\n    {BARRIER}",
        "TQ_STATE_FLOATS, lane, states);",
    ),
    Mutation(
        "no barrier before a block's sums are added up",
        _ENCODE,
        f"{BARRIER}\n  // Simdgroups share",
        "// Simdgroups share",
    ),
    Mutation("no barrier before a block's mean is read", _ENCODE, f"{BARRIER}\n  tq_clear(mean);", "tq_clear(mean);"),
    # Shaders
    Mutation("the last positions of a block are left out", _ATTEND, "p < block_end; p +=", "p + 1 < block_end; p +="),
    Mutation(
        "a window is one position longer", _VISIBLE, "newest - int(params.window) + 1", "newest - int(params.window)"
    ),
    Mutation("a query sees the token after it", _VISIBLE, "min(length, newest + 1)", "min(length, newest + 2)"),
    Mutation("the mask's rows have the wrong length", _ATTEND, "* (params.length - params.start)", "* params.length"),
    Mutation("the mask is that of the first sequence", _VISIBLE, "(params.mask_batch > 1 ? batch : 0)", "0"),
    Mutation("softcap leaves the mean out", _ATTEND, "k_factor) + mean_logit[r];", "k_factor);"),
    Mutation("a block's weight is not scaled down", _ATTEND, "            block_weight[r] *= decay;\n", ""),
    Mutation("the value's scale is the key's", _ATTEND, "numbers.norm * v_factor", "numbers.norm * k_factor"),
    Mutation("all sequences begin where the first does", _ATTEND, "starts[batch]", "starts[0]"),
    Mutation("lengths are not looked at", _ATTEND, "params.has_lengths != 0", "false"),
    Mutation("the tail is no ring", _ATTEND, "slot >= ring ? slot - ring : slot", "slot"),
    Mutation("sums of parts lie too close", _ATTEND, "TQ_HEAD_DIM + at * 2;", "TQ_HEAD_DIM + at;"),
    Mutation("a row too many is stored", _ATTEND, "if (first_row + r >= rows) continue;", ""),
    Mutation(
        "means are read as the tail", _DECODE, "k_norms, k_means, k_tail, group.y", "k_norms, k_tail, k_means, group.y"
    ),
    Mutation("an argument has the wrong index", _DECODE, "v_out [[buffer(10)]]", "v_out [[buffer(12)]]"),
    Mutation("norms of K and V are swapped", _ENCODE, "(is_k ? k_norms : v_norms)", "(is_k ? v_norms : k_norms)"),
    Mutation(
        "padding is counted in the mean",
        _ENCODE,
        "clamp(target.first + int(params.sink_length), begin, end)",
        "clamp(int(params.sink_length), begin, end)",
    ),
    Mutation(
        "sinks are counted in the mean",
        _ENCODE,
        "clamp(target.first + int(params.sink_length), begin, end)",
        "clamp(target.first, begin, end)",
    ),
    Mutation(
        "one row of 64 is lost as it is coded",
        _ENCODE,
        "if (is_new && TQ_TAIL && params.block_size != 0) {",
        "if (position % 64 == 50) tq_clear(row);\n  if (is_new && TQ_TAIL && params.block_size != 0) {",
    ),
    Mutation(
        "one row of 64 is lost as it is kept",
        _ENCODE_H,
        "if (position < first) tq_clear(row);",
        "if (position < first || position % 64 == 50) tq_clear(row);",
    ),
    Mutation("a NaN is counted in the mean", _ENCODE, "tq_add_row(is_there && is_finite,", "tq_add_row(is_there,"),
    Mutation("a NaN of the tail is counted in the mean", _ENCODE, "is_waiting[i] && is_finite,", "is_waiting[i],"),
    Mutation("a mean is of all positions, counted or not", _ENCODE, "max(counted, 1.0f)", "float(count)"),
    Mutation(
        "what is no more there is stored",
        _ENCODE,
        "if (is_there) {\n        tq_store_codes",
        "if (true) {\n        tq_store_codes",
    ),
    Mutation("sinks are not kept", _ENCODE_H, "if (is_there && is_sink) tq_store_half", "if (false) tq_store_half"),
    Mutation(
        "the sink's logit is left out", _REDUCE, "if (finish.has_sinks != 0) state.sum +=", "if (false) state.sum +="
    ),
    Mutation(
        "the log-sum-exp is without its largest logit",
        "shaders/finish.h",
        "state.largest + precise::log",
        "precise::log",
    ),
    Mutation(
        "one lane group's parts alone are merged",
        _REDUCE,
        "i * TQ_SIMD_ROWS + lane_group",
        "i * TQ_SIMD_ROWS",
    ),
    Mutation(
        "the second half of a row has the norm of the first",
        _STORE,
        "store.norms[slot * TQ_NORM_GROUPS + tq_place(lane) / TQ_GROUP_LANES]",
        "store.norms[slot * TQ_NORM_GROUPS]",
    ),
    Mutation("a head's tail begins at the wrong row", _STORE, "head * tail_rows", "head * slots"),
    Mutation("sinks have one row more", _STORE, "first + int(sink_length);\n}", "first + int(sink_length) + 1;\n}"),
    Mutation(
        "the inverse rotation leaves the signs out",
        _ROW,
        "  tq_hadamard(lane, row);\n  tq_apply_signs(signs, row);\n",
        "  tq_hadamard(lane, row);\n",
    ),
    Mutation(
        "large numbers become infinite in half precision",
        _ROW,
        "is_finite ? clamp(x, -TQ_HALF_MAX, TQ_HALF_MAX) : x",
        "x",
    ),
    Mutation("a merge scales the wrong side", _STATE, "state.sum * mine + sum * its", "state.sum * its + sum * mine"),
    # Launch plans
    Mutation(
        "threadgroup memory of attention is one number short",
        _PLAN,
        "queries * static_cast<uint32_t>(call.q.size(3) + 2);",
        "queries * static_cast<uint32_t>(call.q.size(3) + 2) - 4;",
    ),
    Mutation("threadgroup memory of encoding is short", _PLAN, "simdgroups * (head_dim + 1)", "simdgroups * head_dim"),
    Mutation(
        "the last rows have no threadgroup", _PLAN, "(count + size - 1) / size", "std::max(count / size, int64_t{1})"
    ),
    Mutation(
        "new tokens are kept before the old ones are coded",
        _PLAN,
        'launches.push_back({{"encode", "tq_keep"',
        'launches.insert(launches.begin(), Launch{{"encode", "tq_keep"',
    ),
    Mutation("splits are counted wrong", _PLAN, "reduce.splits = params.splits;", "reduce.splits = params.splits + 1;"),
    Mutation(
        "heads of a group are interleaved",
        _PLAN,
        "reduce.num_kv_heads = params.num_kv_heads;",
        "reduce.num_kv_heads = params.num_heads;",
    ),
    # Objective-C++
    Mutation("a view's offset is left out", _LAUNCH, "offset:byte_offset(argument.tensor)", "offset:0"),
    Mutation(
        "an offset is in numbers, not bytes", _LAUNCH, "x.storage_offset() * x.element_size()", "x.storage_offset()"
    ),
    Mutation(
        "buffers are bound one index too far",
        _LAUNCH,
        "offset:byte_offset(argument.tensor) atIndex:i]",
        "offset:byte_offset(argument.tensor) atIndex:i + 1]",
    ),
    Mutation(
        "bytes are bound for pointers that are not followed",
        _LAUNCH,
        "[encoder setBuffer:any offset:0 atIndex:i]",
        "[encoder setBytes:&any length:sizeof(any) atIndex:i]",
    ),
    Mutation(
        "the grid's axes are swapped",
        _LAUNCH,
        "MTLSizeMake(launch.groups[0], launch.groups[1], launch.groups[2])",
        "MTLSizeMake(launch.groups[1], launch.groups[0], launch.groups[2])",
    ),
    Mutation(
        "a simdgroup is missing",
        _LAUNCH,
        "MTLSizeMake(launch.simdgroups * kSimdLanes, 1, 1)",
        "MTLSizeMake(std::max(launch.simdgroups - 1, 1u) * kSimdLanes, 1, 1)",
    ),
    Mutation(
        "all launches have the first one's pipeline",
        _LAUNCH,
        "setComputePipelineState:pipelines[n]",
        "setComputePipelineState:pipelines[0]",
    ),
    Mutation(
        "specialisations share a pipeline",
        _PIPELINE,
        "const std::string key = describe(kernel);",
        "const std::string key = kernel.name;",
    ),
    Mutation(
        "the encoder is fetched outside the queue",
        _LAUNCH,
        "  run_on(stream->queue(), [&] {\n    id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();",
        "  id<MTLComputeCommandEncoder> encoder = stream->commandEncoder();\n  run_on(stream->queue(), [&] {",
    ),
    Mutation("fast math is left on", _PIPELINE, "options.fastMathEnabled = NO;", ""),
]


def find(name: str) -> Mutation:
    """KeyError if there is none of that name."""
    return {mutation.name: mutation for mutation in MUTATIONS}[name]


def current() -> Mutation | None:
    """The fault that this process has to run with."""
    name = os.environ.get(VARIABLE)
    return find(name) if name else None


def run(mutation: Mutation | None) -> tuple[bool, str]:
    """Whether the tests fail with this fault, and the first that does."""
    from metal.hosted import process

    variables = {}
    if mutation is not None:
        mutation.mutated()  # there is a place for it
        variables[VARIABLE] = mutation.name
    done = process.run(["-x", "--tb=line", *TESTS], mode="race", **variables)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode != 0 and not failed:
        raise RuntimeError(f"no test was run: {done.stdout}{done.stderr}")
    return bool(failed), failed[0] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all if none is given")
    names = parser.parse_args().names
    fails, by = run(None)
    if fails:
        parser.exit(1, f"the tests fail without any fault: {by}\n")
    missed = 0
    for mutation in [find(name) for name in names] or MUTATIONS:
        start = time.monotonic()
        is_noticed, by = run(mutation)
        missed += not is_noticed
        verdict = "noticed" if is_noticed else "MISSED "
        print(f"{verdict} {time.monotonic() - start:4.0f} s  {mutation.file}: {mutation.name}\n    {by}", flush=True)
    print(f"{missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
