"""Where bits pay: the storage of each layer's keys and values, chosen by what their error does to the model."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import format as fmt
from ..cache import KVCache
from .balance import balance_keys
from .candidates import OPTIONS, Candidate, Compressed, Exact
from .measure import divergence
from .models import Model, Text

PLAN_VERSION = 1
DEFAULT_FORMATS = ("tq2", "tq3", "tq4", "tq5", "tq6", "tq8")
# A side's divergence is measured in these two, coarse enough to stand out of the noise, and scaled to the others.
PROBES = ("tq3", "tq4")
# Of the mean divergence: what a side counts at least, so that bytes that are left over go to it rather than to nobody.
LEAST_SHARE = 1e-3
ROUNDING = 1e-12  # of a budget: sums of fractions of a byte, in another order, differ by less

Side = tuple[int, str]  # a layer, and "k" or "v"


@dataclass(frozen=True)
class Plan:
    """How to hold each layer of a model's cache.

    model: its name.
    layers: {layer: keyword arguments of KVCache}: k_format, v_format, the options that were given, and k_balance where
        keys are balanced.
    predicted: {layer: (keys, values)}: what each is expected to add to the divergence, in nats.
    bytes_per_token: of all layers and KV heads together.
    kld: the mean KL divergence of the model's predictions measured with the plan, on the texts it was made on.
    """

    model: str
    layers: Mapping[int, Mapping[str, Any]]
    predicted: Mapping[int, tuple[float, float]]
    bytes_per_token: float
    kld: float

    def candidate(self, name: str = "plan") -> Candidate:
        """The plan as something to measure beside others."""
        return Candidate(name, None, {i: _storage(options) for i, options in self.layers.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, one line a layer. `load` gives the same plan, every number of k_balance included."""
        content = {
            "plan_version": PLAN_VERSION,
            "format_version": fmt.FORMAT_VERSION,
            "model": self.model,
            "bytes_per_token": self.bytes_per_token,
            "kld": self.kld,
        }
        lines = [
            json.dumps({"layer": i, "predicted": self.predicted[i], **{n: _plain(x) for n, x in options.items()}})
            for i, options in self.layers.items()
        ]
        fields = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in content.items())
        Path(path).write_text("{\n" + fields + '"layers": [\n' + ",\n".join(lines) + "\n]\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no plan, of another version, or damaged.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            versions = (content["plan_version"], content["format_version"])
            if versions != (PLAN_VERSION, fmt.FORMAT_VERSION):
                raise ValueError(f"it has versions {versions}, supported are {(PLAN_VERSION, fmt.FORMAT_VERSION)}")
            layers, predicted = {}, {}
            for values in content["layers"]:
                layer = int(values.pop("layer"))
                if layer in layers:
                    raise ValueError(f"it has layer {layer} twice")
                keys, of_values = values.pop("predicted")
                predicted[layer] = float(keys), float(of_values)
                layers[layer] = _checked(values)
            return cls(
                str(content["model"]), layers, predicted, float(content["bytes_per_token"]), float(content["kld"])
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable plan: {error!r}") from error


def plan(
    model: Model,
    texts: Sequence[Text],
    bytes_per_token: float,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    balance: bool = True,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> Plan:
    """Choose each layer's K and V format for a budget of bytes, by the KL divergence measured on some texts.

    Each side of each layer is coded alone, in two formats, and the divergence that this causes in the model's
    predictions is measured. Divergence grows with the mean squared error of the codes, so that those two measurements
    tell what every format would do; bits then go where they lower the sum most.

    Args:
        model: a `HuggingFaceModel` or a `CallableModel`.
        texts: short pieces of typical text, from `cut`; two or three of 512 tokens do.
        bytes_per_token: the budget, for one token in all layers and KV heads; `uniform_bytes` tells what a pair of
            formats takes in every layer.
        formats: those to choose from. Where keys are "f16", they are not balanced.
        balance: whether to balance keys too (see KVCache's k_balance), from the same texts.
        progress: called with (measurements done, measurements in all).
        options: arguments of KVCache for all layers: block_size, residual_length, encode, sink_length.

    Returns:
        The plan. KVCache takes its layers' options: KVCache(1, kv_heads, head_dim, capacity, **plan.layers[i]).

    Raises:
        ValueError: an unknown format or option, no texts, a budget that the smallest formats exceed, or a model whose
            predictions are not finite.
    """
    if not texts:
        raise ValueError("no texts to measure on; cut some from a file with fidelity.cut")
    _check_options(formats, options)
    shapes = model.all_shapes()
    sides = [(layer, side) for layer in shapes for side in "kv"]
    block = options.get("block_size", fmt.DEFAULT_BLOCK_SIZE)
    costs = {
        (layer, side, name): shapes[layer][0] * fmt.bytes_per_token(name, name, shapes[layer][1], block) / 2
        for layer, side in sides
        for name in formats
    }
    allocate(sides, formats, costs, dict.fromkeys(costs, 0.0), bytes_per_token)  # a budget too small is found here
    factors = balance_keys(model, texts, block) if balance else {}

    def layer_options(layer: int, k_format: str, v_format: str) -> dict[str, Any]:
        is_balanced = layer in factors and k_format != "f16"  # dense keys gain nothing by it
        balanced = {"k_balance": factors[layer]} if is_balanced else {}
        return {"k_format": k_format, "v_format": v_format, **options, **balanced}

    total = len(sides) * len(PROBES) + 1
    done = 0

    def measure(candidate: Candidate) -> float:
        nonlocal done
        found = divergence(model, texts, candidate, "coded").kld
        if not math.isfinite(found):
            raise ValueError(f"{model.name} predicts numbers that are not finite: its divergence is {found}")
        done += 1
        if progress is not None:
            progress(done, total)
        return max(found, 0.0)

    encode = options.get("encode", "fast")
    weights = {}
    for layer, side in sides:
        ratios = []
        for name in PROBES:
            alone = layer_options(layer, name, "f16") if side == "k" else layer_options(layer, "f16", name)
            found = measure(Candidate(name, Exact(), {layer: _storage(alone)}))
            ratios.append(found / distortion(name, shapes[layer][1], encode))
        weights[layer, side] = sum(ratios) / len(ratios)
    least = LEAST_SHARE * sum(weights.values()) / len(weights)
    errors = {
        (layer, side, name): max(weights[layer, side], least) * distortion(name, shapes[layer][1], encode)
        for layer, side, name in costs
    }
    chosen = allocate(sides, formats, costs, errors, bytes_per_token)
    layers = {i: layer_options(i, chosen[i, "k"], chosen[i, "v"]) for i in shapes}
    predicted = {i: (errors[i, "k", chosen[i, "k"]], errors[i, "v", chosen[i, "v"]]) for i in shapes}
    spent = sum(costs[layer, side, name] for (layer, side), name in chosen.items())
    kld = measure(Candidate("plan", None, {i: _storage(values) for i, values in layers.items()}))
    return Plan(model.name, layers, predicted, spent, kld)


def allocate(
    sides: Sequence[Side],
    formats: Sequence[str],
    costs: Mapping[tuple[int, str, str], float],
    errors: Mapping[tuple[int, str, str], float],
    budget: float,
) -> dict[Side, str]:
    """A format for each side, so that the costs stay within the budget and the sum of the errors is small.

    Starts from the cheapest and takes, again and again, the step that lowers the error most for its cost. Since a step
    may go to any format, no later one is better than it, and a larger budget never ends with a larger error.

    Raises:
        ValueError: the budget is not a number, or the cheapest formats exceed it.
    """
    chosen = {
        (layer, side): min(formats, key=lambda name: (costs[layer, side, name], errors[layer, side, name]))
        for layer, side in sides
    }
    least = sum(costs[layer, side, name] for (layer, side), name in chosen.items())
    left = budget + ROUNDING * abs(budget) - least
    if not left >= 0:  # NaN is not
        raise ValueError(f"a budget of {budget:g} bytes a token is too small: the smallest formats take {least:g}")
    while True:
        best, best_gain = None, 0.0
        for (layer, side), name in chosen.items():
            for other in formats:
                cost = costs[layer, side, other] - costs[layer, side, name]
                saved = errors[layer, side, name] - errors[layer, side, other]
                if 0 < cost <= left and saved / cost > best_gain:
                    best, best_gain = (layer, side, other, cost), saved / cost
        if best is None:
            return chosen
        layer, side, other, cost = best
        chosen[layer, side] = other
        left -= cost


def uniform_bytes(model: Model, k_format: str, v_format: str, block_size: int = fmt.DEFAULT_BLOCK_SIZE) -> float:
    """Bytes of one token in all layers and KV heads of a model with the same formats everywhere.

    Raises:
        ValueError: an unknown format, or a negative block size.
    """
    return sum(
        heads * fmt.bytes_per_token(k_format, v_format, head_dim, block_size)
        for heads, head_dim in model.all_shapes().values()
    )


@lru_cache
def distortion(name: str, head_dim: int, encode: str) -> float:
    """Mean squared error of a format, of normally distributed numbers of variance 1."""
    rows = torch.randn(1, 1, 1024, head_dim, generator=torch.Generator().manual_seed(0))
    cache = KVCache(1, 1, head_dim, 1024, name, name, "cpu", block_size=0, sink_length=0, encode=encode)
    cache.append(rows, rows)
    return (cache.dense()[0] - rows).square().mean().item()


def _check_options(formats: Sequence[str], options: Mapping[str, Any]) -> None:
    if not formats or isinstance(formats, str):
        raise ValueError(f"formats must be names to choose from, such as {DEFAULT_FORMATS}, got {formats!r}")
    for name in formats:
        fmt.get_format(name)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; choose from {', '.join(OPTIONS)}")
    KVCache(1, 1, fmt.HEAD_DIMS[0], 1, **options)  # a wrong value is reported here


def _storage(options: Mapping[str, Any]) -> Compressed:
    rest = {name: value for name, value in options.items() if name not in ("k_format", "v_format")}
    return Compressed(options["k_format"], options["v_format"], rest)


def _plain(value: Any) -> Any:
    """What JSON can hold; of a float32 number, the shortest decimal that is read as the same."""
    return [[float(str(x)) for x in row] for row in value.cpu().numpy()] if isinstance(value, Tensor) else value


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of KVCache from a file; ValueError or TypeError if it does not take them."""
    heads, head_dim = 1, fmt.HEAD_DIMS[0]
    if "k_balance" in values:
        values["k_balance"] = torch.tensor(values["k_balance"], dtype=torch.float32)
        heads, head_dim = values["k_balance"].shape
    unknown = sorted(set(values) - {"k_format", "v_format", "k_balance", *OPTIONS})
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}")
    KVCache(1, heads, head_dim, 1, **values)
    return values
