"""Bad models of a --model: exit code 2 and one sentence, before anything is started or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input.cases import Case, check_refusal, indent


def model(body: str, argv: str, *words: str) -> Case:
    """Return a case whose --model is the function of this body, on toy (16 features, 4 classes)."""
    code = f"import threading, torch\nfrom torch import nn\nF = nn.functional\ndef make():\n{indent(body)}"
    return Case(f"--model mine:make {argv}", words, code)


def module(forward: str, init: str = "self.a = nn.Linear(16, 4)") -> str:
    """Return the body of a model function that makes a module with this forward."""
    lines = ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in init.split("; ")]
    return "\n".join([*lines, "    def forward(self, x):", f"        {forward}", "return M()"])


CASES = {
    "model_no_module": Case("--model nowhere:make", ("--model nowhere:make", "does not import")),
    "model_no_function": Case("--model mine:make", ("no function make", "spelling"), "import torch"),
    "model_raises": model("raise KeyError('layers')", "", "make raised KeyError: 'layers'"),
    "model_is_class_name": model("return nn.Linear", "", "returned type", "torch.nn.Module"),
    "model_returns_none": model("pass", "", "returned NoneType", "torch.nn.Module"),
    "model_no_params": model("return nn.ReLU()", "", "no trainable parameter", "requires_grad"),
    "model_frozen": model("return nn.Linear(16, 4).requires_grad_(False)", "", "no trainable parameter"),
    "model_float64": model("return nn.Linear(16, 4).double()", "", "weight is torch.float64", "model.float()"),
    "model_half": model("return nn.Linear(16, 4).half()", "", "weight is torch.float16", "model.float()"),
    "model_lazy_layers": model("return nn.LazyLinear(4)", "", "weight has no shape yet", "sizes given"),
    "model_batch_norm": model(
        "return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))",
        "",
        "1 is BatchNorm1d",
        "GroupNorm",
        "--fix-model",
    ),
    "model_batch_norm_none": model(
        "return nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))", "--noise-level none", "0 is BatchNorm1d"
    ),
    "model_mutates_buffer": model(
        module("self.seen += 1; return self.a(x)", "self.a = nn.Linear(16, 4); self.register_buffer('seen', torch.zeros(1))"),
        "",
        "buffer seen changes",
        "remove it",
    ),
    "model_makes_buffer": model(module("self.register_buffer('b', x.sum()); return self.a(x)"), "", "buffer b changes"),
    "model_couples_records": model(module("return self.a(x - x.mean(dim=0))"), "", "Linear", "other records of its batch"),
    "model_couples_with_dropout": model(
        module("return self.a(F.dropout(x - x.mean(dim=0)))"), "", "other records of its batch", "independent"
    ),
    "model_wrong_inputs": model("return nn.Linear(17, 4)", "", "forward pass", "shape (16,)", "the data's records"),
    "model_too_few_outputs": model("return nn.Linear(16, 3)", "", "label 3 is out of range", "3 outputs", "0 … 2"),
    "model_outputs_flat": model(module("return self.a(x).sum(1)"), "", "outputs have shape (3,)", "[records, classes]"),
    "model_outputs_whole": model(module("return self.a(x).long()"), "", "outputs have shape (3, 4)", "float32"),
    "model_outputs_tuple": model(module("return self.a(x), x"), "", "returned tuple, not a tensor"),
    "model_cannot_be_copied": model(
        module("return self.a(x)", "self.a = nn.Linear(16, 4); self.lock = threading.Lock()"), "", "cannot be copied", "lock"
    ),
    "model_raises_when_it_trains": model(
        module("if torch.is_grad_enabled(): raise ValueError('broke')\n        return self.a(x)"),
        "",
        "on a single record",
        "ValueError: broke",
    ),
    "model_leaves": model(module("raise SystemExit(0)"), "", "forward pass", "SystemExit", "must accept"),
    "model_leaves_when_it_trains": model(
        module("if torch.is_grad_enabled(): raise SystemExit(0)\n        return self.a(x)"),
        "",
        "on a single record",
        "SystemExit",
        "must return",
    ),
    "model_looks_at_values": model(
        module("return self.a(torch.from_numpy(x.numpy()))"), "", "looks at the values of a record", "use torch.where"
    ),
    "model_of_unproven_parts_for_opacus": model(
        module("return F.linear(x, self.a.weight, self.a.bias)"), "--engine opacus", "--engine is opacus", "--engine auto"
    ),
    "model_of_unproven_parts_as_sequence": model(
        module("return self.a(x)"), "--engine sequence", "--engine is sequence", "(M)", "--engine auto"
    ),
    "model_fix_not_enough": model(
        "return nn.Sequential(nn.Linear(17, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))", "--fix-model", "forward pass"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_main_refuses(
    name: str, project: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], project, tmp_path, capsys)
