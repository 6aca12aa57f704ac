"""Families of the zoo from Hugging Face: GPT-2, GPT-2 with peft's LoRA, and BERT, built from configs (no download).

Nothing draws at random here. transformers and peft are imported when a model is built, which takes them seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from families.family import IGNORED, NUM_CLASSES, Bars, Family, Records, class_losses, labels, token_losses, tokens

VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS = 128, 16, 32, 2, 4
MASK_TOKEN, PADDING = 1, 0


class OfTokens(nn.Module):
    """A Hugging Face model whose x is the tokens alone; it hands in the attention mask and returns the logits."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self._options = options

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **self._options).logits


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=PADDING,
        eos_token_id=PADDING,
    )
    return OfTokens(GPT2LMHeadModel(config), use_cache=False)


def _gpt2_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True)
    model = _gpt2()
    model.model = get_peft_model(model.model, config)
    return model


def _bert_config(**changes: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **changes,
    )


def _bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config(num_labels=NUM_CLASSES))


def _bert_masked() -> nn.Module:
    from transformers import BertForMaskedLM

    return OfTokens(BertForMaskedLM(_bert_config()))


def _following_tokens(number: int, generator: torch.Generator) -> Records:
    drawn = torch.randint(2, VOCABULARY, (number, LENGTH + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def _hidden_tokens(number: int, generator: torch.Generator) -> Records:
    drawn = torch.randint(2, VOCABULARY, (number, LENGTH), generator=generator)
    hidden = torch.rand(drawn.shape, generator=generator) < 0.15
    return drawn.masked_fill(hidden, MASK_TOKEN), drawn.masked_fill(~hidden, IGNORED)


def _padded(number: int, generator: torch.Generator) -> Records:
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (number, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    drawn = torch.randint(2, VOCABULARY, (number, LENGTH), generator=generator)
    return {"input_ids": drawn * mask, "attention_mask": mask}, labels(number, generator)


NEEDS = ("transformers",)
LANGUAGE = {
    "gpt2": Family(
        title="GPT-2, 2 layers of width 32",
        build=_gpt2,
        records=_following_tokens,
        loss=token_losses,
        needs=NEEDS,
        bars=Bars(of_plain=0.4),
    ),
    "gpt2-lora": Family(
        title="GPT-2 with LoRA",
        build=_gpt2_lora,
        records=_following_tokens,
        loss=token_losses,
        needs=(*NEEDS, "peft"),
        bars=Bars(of_plain=0.4),
    ),
    "bert": Family(
        title="BERT, classification of sequences",
        build=lambda: OfTokens(_bert()),
        records=tokens(LENGTH, VOCABULARY),
        loss=class_losses,
        needs=NEEDS,
        bars=Bars(of_plain=0.4),
    ),
    "bert-padded": Family(
        title="BERT, padded sequences (x a dict)",
        build=_bert,
        records=_padded,
        loss=class_losses,
        needs=NEEDS,
        bars=Bars(of_plain=0.4),
    ),
    "bert-masked": Family(
        title="BERT, masked language model",
        build=_bert_masked,
        records=_hidden_tokens,
        loss=token_losses,
        needs=NEEDS,
        bars=Bars(of_plain=0.4),
    ),
}
