"""The doctor's report, and that it sees what is wrong and goes on."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_tqattn import format as fmt
from torch_tqattn.__main__ import main
from torch_tqattn.doctor import command, machine, operators, seed_operators
from torch_tqattn.ops import OPERATORS

Operator = Callable[..., Any]


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "CASES", (operators.FEATURES, operators.Case(80, "f16", "tq3", block_size=0)))
    monkeypatch.setattr(seed_operators, "HEAD_DIMS", (512,))
    monkeypatch.setattr(seed_operators, "BITS", (4, 8))


def report(capsys: pytest.CaptureFixture[str], *devices: str) -> tuple[int, str]:
    """Exit code and text."""
    try:
        command.run(argparse.Namespace(device=list(devices)))
        code = 0
    except SystemExit as end:
        code = int(str(end.code))
    return code, capsys.readouterr().out


def replace_operator(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Operator], Operator]) -> None:
    """Let the doctor call another function instead of an operator."""
    replaced = argparse.Namespace(**{each: getattr(torch.ops.tqattn, each) for each in (*OPERATORS, "launch_policy")})
    setattr(replaced, name, change(getattr(replaced, name)))
    monkeypatch.setattr(torch.ops, "tqattn", replaced)


def select(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the doctor check these operators only."""
    chosen = [check for check in command.checks() if check.name.split()[0] in names]
    monkeypatch.setattr(command, "checks", lambda: chosen)


def test_every_operator_passes(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = report(capsys, device)
    checks = command.checks()
    assert (code, text.count("  ok\n")) == (0, len(checks)), text
    assert text.endswith(f"all {len(checks)} checks passed\n")
    assert {check.name.split()[0] for check in checks} == set(OPERATORS)


def test_every_format_and_head_dim_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (
        {case.k_format for case in operators.CASES} == {case.v_format for case in operators.CASES} == set(fmt.FORMATS)
    )
    assert {case.head_dim for case in operators.CASES} == set(fmt.HEAD_DIMS)


def test_the_command_describes_the_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["torch_tqattn", "doctor", "--device", "cpu"])
    monkeypatch.setenv("TQATTN_TQ_NWG", "8")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setattr(command, "checks", list)
    main()
    text = capsys.readouterr().out
    assert "secret" not in text
    lines = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines())
    assert f"format version {fmt.FORMAT_VERSION}" in lines["torch_tqattn"]
    assert torch.__version__ in lines["torch"]
    assert "_C." in lines["libraries"]
    assert "TQATTN_TQ_NWG=8" in lines["environment"]
    assert f"kernels for {len(OPERATORS)} of {len(OPERATORS)} operators" in lines["cpu"]
    assert {"Python", "system", "processor", "instructions", "mps", "cuda"} <= set(lines)
    assert not any("unknown" in lines[name] for name in ("torch_tqattn", "torch", "system", "processor", "libraries"))


def times_more(operator: Operator, factor: float) -> Operator:
    """The operator with its first result multiplied."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        results = operator(*arguments, **options)
        return (results[0] * factor, *results[1:]) if isinstance(results, tuple) else results * factor

    return wrong


@pytest.mark.parametrize("factor", [1 + 2e-6, 0.0, float("nan")])
@pytest.mark.parametrize("name", ["rotate", "attend", "decode_kv", "decode_step_", "flash_attn_vec_reduce"])
def test_wrong_results_are_seen(
    name: str, factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select(monkeypatch, name, "fwht_sign_undo")
    replace_operator(monkeypatch, name, lambda operator: times_more(operator, factor))
    code, text = report(capsys, "cpu")
    lines = [line for line in text.splitlines() if line.startswith(f"  {name} ") and " float16 " not in line]
    wrong = [line for line in lines if line.endswith("FAILED")]
    half = [line for line in lines if "attend" in line and "bfloat16" in line]  # rounds more than that
    assert code == 1
    assert len(wrong) >= len(lines) - len(half)
    assert text.count("  ok\n") + text.count("  FAILED\n") == len(command.checks())


def test_wrong_stores_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def change(operator: Operator) -> Operator:
        def encode(*arguments: Any) -> None:
            operator(*arguments)
            if arguments[12] == 0:  # the first position
                arguments[2][0, 0, 5, 7] ^= 64  # one bit of one key's codes

        return encode

    monkeypatch.setattr(operators, "CASES", (operators.FEATURES,))
    select(monkeypatch, "encode_kv_", "decode_kv")
    replace_operator(monkeypatch, "encode_kv_", change)
    code, text = report(capsys, "cpu")
    assert code == 1
    assert [line.split()[0] for line in text.splitlines() if line.endswith("  FAILED")] == ["encode_kv_"]


def test_all_of_a_message_is_printed_and_other_checks_go_on(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(operator: Operator) -> Operator:
        def refused(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("cannot compile tq_attend\nattend.metal:1:1: error: no\nattend.metal:2:1: note: why")

        return refused

    select(monkeypatch, "attend", "rotate")
    replace_operator(monkeypatch, "attend", change)
    code, text = report(capsys, device)
    assert code == 1
    message = (
        "    RuntimeError: cannot compile tq_attend\n    attend.metal:1:1: error: no\n    attend.metal:2:1: note: why\n"
    )
    failed = text.count(message)
    assert failed == len([check for check in command.checks() if check.name.startswith("attend ")])
    assert text.endswith(f"\n{failed} of {len(command.checks())} checks FAILED\n")


def test_a_wrong_type_or_shape_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    select(monkeypatch, "rotate")
    replace_operator(monkeypatch, "rotate", lambda operator: lambda *arguments: operator(*arguments)[:1].half())
    code, text = report(capsys, "cpu")
    assert code == 1
    assert "gave torch.float16 [1, 7, 80] instead of torch.float32 [3, 7, 80]" in text


def test_a_device_that_is_not_here_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select(monkeypatch, "rotate")
    monkeypatch.setattr(command, "is_here", lambda device: device == "cpu")
    code, text = report(capsys, "mps", "cpu")
    assert code == 1
    assert "mps: FAILED: there is no such device" in text
    assert text.endswith(f"\n1 of {len(command.checks()) + 1} checks FAILED\n")


def test_what_cannot_be_read_does_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    select(monkeypatch, "rotate")
    monkeypatch.setattr(machine, "processor", lambda: 1 / 0)
    code, text = report(capsys, "cpu")
    assert code == 0
    assert "unknown (ZeroDivisionError: division by zero)" in text
