"""Models of Hugging Face's transformers, built from a config, and peft's adapters: trained, written and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedray
from fedray.data.shards import ShardCache
from fedray.errors import InputError
from fedray.privacy.streams import RoundKeys
from fedray.training.engines import new_trainer

transformers = pytest.importorskip("transformers", reason="the models under test are its")
# peft asks a model of transformers by a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WORDS, LENGTH, CLASSES = 40, 8, 3
SMALL = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
QUIET_BERT = {**SMALL, "intermediate_size": 16, "max_position_embeddings": LENGTH}
ATTENTION = ("eager", "sdpa")


def gpt2(attention: str = "eager") -> nn.Module:
    """Return a causal language model whose first and last layers share their weights."""
    config = transformers.GPT2Config(
        **SMALL, n_positions=LENGTH, bos_token_id=0, eos_token_id=1, use_cache=False, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config)


def with_adapters(attention: str = "eager") -> nn.Module:
    peft = pytest.importorskip("peft", reason="the adapters under test are its")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(gpt2(attention), config)


def classifier(attention: str = "eager") -> nn.Module:
    config = transformers.BertConfig(**QUIET_BERT, num_labels=CLASSES, attn_implementation=attention)
    return transformers.BertForSequenceClassification(config)


def masked_words(attention: str = "eager") -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**QUIET_BERT, attn_implementation=attention))


def word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the words `[n, T]` that are not marked by -100."""
    found = nn.functional.cross_entropy(output.transpose(1, 2), target, ignore_index=-100, reduction="none")
    return found.sum(1) / (target >= 0).sum(1)


def next_word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return word_loss(output[:, :-1], target[:, 1:])


def records(number: int, seed: int, words: bool) -> tuple[dict[str, Any], Any]:
    """Return sentences of several lengths with their masks; and their own words as targets, or classes."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(WORDS, size=(number, LENGTH))
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, size=(number, 1))
    x = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    return x, np.where(mask, ids, -100) if words else ids[:, 0] % CLASSES


def federation(model: Any, loss: Any, out: Path, **changes: Any) -> fedray.Orchestrator:
    words = loss is not None
    settings: dict[str, Any] = {"rounds": 1, "local_steps": 2, "batch_size": 4, "pool": "inline", "seed": 0}
    return fedray.Orchestrator(
        [records(16 + gateway, gateway, words) for gateway in range(2)],
        model=model,
        loss=loss,
        test=records(10, 9, words),
        config=fedray.RunConfig().resolve(**{**settings, "noise_level": "sample", "out": out, **changes}),
    )


CASES = {
    "causal": (gpt2, next_word_loss),
    "adapters": (with_adapters, next_word_loss),
    "classifier": (classifier, None),
    "masked": (masked_words, word_loss),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_transformer_trains_and_is_loaded_again(name: str, attention: str, tmp_path: Path) -> None:
    make, loss = CASES[name]
    run = federation(lambda: make(attention), loss, tmp_path / "run").run()
    assert np.isfinite(run.history[-1]["loss"])
    assert (run.history[-1]["accuracy"] is None) == (loss is not None)
    loaded, x = fedray.load_model(run.path, lambda: make(attention)), records(5, 3, False)[0]
    tokens = {key: torch.from_numpy(value) for key, value in x.items()}
    assert torch.equal(loaded(**tokens).logits, run.model(**tokens).logits)


def test_tied_weights_are_written_twice_and_loaded_as_one(tmp_path: Path) -> None:
    run = federation(gpt2, next_word_loss, tmp_path / "run").run()
    state = load_file(run.path / "model.safetensors")
    assert torch.equal(state["transformer.wte.weight"], state["lm_head.weight"])
    loaded = fedray.load_model(run.path, gpt2)
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("transformer.wte.weight")


def test_only_adapters_travel(tmp_path: Path) -> None:
    plan = federation(with_adapters, next_word_loss, tmp_path / "run").plan
    assert plan.layout.names
    assert all("lora_" in name for name in plan.layout.names)
    total = sum(parameter.numel() for parameter in plan.model.parameters())
    assert plan.layout.num_params == 2 * (8 + 24) < total / 10


def test_only_adapters_change(tmp_path: Path) -> None:
    orchestrator = federation(with_adapters, next_word_loss, tmp_path / "run")
    before = {name: value.clone() for name, value in orchestrator.plan.model.state_dict().items()}
    after = orchestrator.run().model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert changed == set(orchestrator.plan.layout.names)


def without_draws(model: nn.Module) -> nn.Module:
    """Switch Dropout off: each trainer draws by keys of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("name", "level"),
    # Opacus at `sample`: no embedding of positions, whose indices are the same for all records, may be trained.
    [("adapters", "sample"), *((name, "gateway") for name in CASES)],
)
def test_updates_are_those_of_the_reference(name: str, level: str, tmp_path: Path) -> None:
    make, loss = CASES[name]
    plan = federation(lambda: without_draws(make()), loss, tmp_path / "run", noise_level=level, optimizer="sgd").plan
    shards = ShardCache(plan.setup.shards, plan.setup.rules)
    found = [
        new_trainer(engine, plan.model, plan.training, torch.device("cpu")).train(
            RoundKeys(round_key=bytes(32), round_index=1), plan.layout.flatten(plan.model), [0, 1], shards
        )
        for engine in ("alone", "opacus")
    ]
    assert np.linalg.norm(found[0] - found[1]) < 1e-5 * np.linalg.norm(found[1])


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Words behind the mask may be anything: the same run, but for what its identity says of the data."""
    found = []
    for name, word in (("one", 0), ("other", 5)):
        pairs = [records(16, gateway, True) for gateway in range(2)]
        for x, _ in pairs:
            x["input_ids"][x["attention_mask"] == 0] = word
        config = fedray.RunConfig().resolve(
            rounds=1, local_steps=2, batch_size=4, pool="inline", seed=0, noise_level="sample", out=tmp_path / name
        )
        run = fedray.Orchestrator(pairs, model=gpt2, loss=next_word_loss, config=config).run()
        found.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    assert torch.equal(*found)


def test_missing_input_is_named(tmp_path: Path) -> None:
    pairs = [({"tokens": x["input_ids"]}, y) for x, y in (records(16, 0, False), records(16, 1, False))]
    with pytest.raises(InputError, match=r"shape {'tokens': \(8,\)} raised .*called with the arguments tokens"):
        fedray.Orchestrator(pairs, model=classifier, config=fedray.RunConfig().resolve(batch_size=4, pool="inline"))
