"""The words around a run: the rows of the start panel and the closing sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fedray.orchestrator.plan import Plan
from fedray.orchestrator.session import Session
from fedray.pool.pool import PoolInfo
from fedray.privacy.accounting import Guarantee
from fedray.rundir import cards


def panel_rows(plan: Plan, info: PoolInfo, planned: Sequence[Guarantee]) -> list[tuple[str, str]]:
    """Return what runs where, and at which privacy."""
    federation, training = plan.config.federation, plan.config.training
    share = federation.participation
    joining = "" if share == 1 else f" (each takes part with probability {share:g})"
    return [
        ("where", info.summary),
        ("what", f"{federation.gateways} gateways{joining}, {federation.rounds} rounds × {training.local_steps} local steps, "
         f"B = {training.batch_size} (q = {plan.spec.sample_rate:.4g}), {training.optimizer}, lr {training.lr:g}"),
        ("model", f"{training.model}, {plan.layout.num_params:,} trainable parameters, engine {plan.setup.engine}"),
        *privacy_rows(plan, planned),
    ]  # fmt: skip


def privacy_rows(plan: Plan, planned: Sequence[Guarantee]) -> list[tuple[str, str]]:
    """Return the panel's rows about privacy."""
    if not planned:
        return [("privacy", "none: --noise-level none promises nothing")]
    spec = plan.spec
    return [
        ("privacy", f"{spec.noise_level} level, sigma = {spec.noise_multiplier:.4g}, C = {spec.clip_norm:g}, "
         f"delta = {spec.delta:g}"),
        *(
            ("planned", f"epsilon {cards.format_epsilon(g.epsilon)} per {g.unit} ({g.adjacency}), "
             + ("" if g.mu is None else f"mu {cards.format_epsilon(g.mu)}, ") + f"against {g.observer}")
            for g in planned
        ),
    ]  # fmt: skip


def closing_sentences(plan: Plan, found: Sequence[Guarantee], session: Session, stopped: str | None) -> list[str]:
    """Return what a reader should take home from the run."""
    lines = [] if stopped is None else [stopped]
    last = session.last_record
    if last is not None and last["accuracy"] is not None:
        lines.append(f"accuracy {last['accuracy']:.4f} on held-out data after {last['round']} rounds.")
    lines += [cards.sentence(guarantee) for guarantee in found] or ["no privacy: --noise-level none promises nothing."]
    if plan.config.run.seed is not None and found:
        lines.append("simulation only: with --seed the noise can be predicted by whoever knows the seed.")
    if session.speeds:
        lines.append(f"{sorted(session.speeds)[len(session.speeds) // 2]:,.0f} samples/s (median round).")
    lines.append(f"files: {session.files.path}")
    return lines
