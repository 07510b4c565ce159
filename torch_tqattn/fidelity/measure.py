"""How far a candidate moves a model's predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import Candidate, View
from .models import Model, Text

# Numbers of a float64 chunk: a whole window of a large vocabulary would not fit many machines.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Metrics:
    """Means over all positions of some texts.

    kld, kld_p999: KL divergence of the predictions from the exact ones, in nats: its mean, and its 99.9th percentile.
    top1: the share of positions whose most likely token is the same.
    bits_per_byte: how well the text is predicted.
    """

    kld: float
    kld_p999: float
    top1: float
    bits_per_byte: float


@dataclass(frozen=True)
class Comparison:
    """Two predictions of one text: divergence float64 [T], same_top bool [T], and the bits that the text costs."""

    divergence: Tensor
    same_top: Tensor
    bits: float
    nbytes: int


def compare(exact: Tensor, got: Tensor, text: Text) -> Comparison:
    """Compare logits `got` with the exact ones, both [T, vocab], after each token of a text."""
    divergence, same_top, nats = [], [], 0.0
    device = torch.device("cpu") if got.device.type == "mps" else got.device  # Apple GPUs have no float64
    following = text.tokens[0, 1:].to(device)
    rows = max(1, CHUNK // got.shape[1])
    for begin in range(0, len(got), rows):
        p = exact[begin : begin + rows].to(device).double().log_softmax(-1)
        q = got[begin : begin + rows].to(device).double().log_softmax(-1)
        divergence.append((p.exp() * (p - q)).sum(-1).cpu())
        same_top.append((p.argmax(-1) == q.argmax(-1)).cpu())
        wanted = following[begin : begin + rows]
        nats -= q[: len(wanted)].gather(-1, wanted[:, None]).sum().item()
    return Comparison(torch.cat(divergence), torch.cat(same_top), nats / math.log(2), text.nbytes)


def summarise(comparisons: Sequence[Comparison]) -> Metrics:
    """The comparisons of several texts in one."""
    divergence = torch.cat([c.divergence for c in comparisons])
    return Metrics(
        kld=divergence.mean().item(),
        kld_p999=torch.quantile(divergence, 0.999).item(),
        top1=torch.cat([c.same_top for c in comparisons]).double().mean().item(),
        bits_per_byte=sum(c.bits for c in comparisons) / max(1, sum(c.nbytes for c in comparisons)),
    )


def compare_candidate(model: Model, text: Text, candidate: Candidate, view: View) -> Comparison:
    """What a model predicts when each layer reads what the candidate holds, against what it predicts by itself."""
    exact = model.exact_logits(text)
    return compare(exact, model.logits(text.tokens.to(model.device), candidate.substitute(view)), text)


def divergence(model: Model, texts: Sequence[Text], candidate: Candidate, view: View = "loop") -> Metrics:
    """How far a candidate moves a model's predictions of some texts (see `models.cut`).

    The exact predictions are computed once for each text and kept with the model as far as they fit.
    """
    return summarise([compare_candidate(model, text, candidate, view) for text in texts])
