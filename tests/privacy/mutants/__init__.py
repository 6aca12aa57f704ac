"""Ways to break the mechanism: each patches real functions or classes of fedray, wherever they were imported to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.privacy.mutants import books, clipping, noise, steps
from tests.privacy.mutants.patching import Patch

Applied = Mapping[str, Callable[[Patch, str], None]]
MUTANTS: Applied = {
    "half noise": noise.scaled_noise(0.5),
    "two thirds of the noise": noise.scaled_noise(2 / 3),
    "three halves of the noise": noise.scaled_noise(1.5),
    "no noise": noise.scaled_noise(0.0),
    "noise shared by gateways": noise.noise_shared_by_gateways,
    "noise shared by steps": noise.noise_shared_by_steps,
    "noise shared by rounds": noise.noise_shared_by_rounds,
    "noise shared by attempts": noise.noise_shared_by_attempts,
    "keys start again on resume": noise.keys_start_again_on_resume,
    "round keys without incarnation": noise.keys_without_incarnation,
    "repeated under the new incarnation": noise.repeated_under_the_new_incarnation,
    "cohort drawn without the attempt": noise.cohort_without_the_attempt,
    "aggregate noise ignores who arrived": noise.aggregate_noise_ignores_who_arrived,
    "no clipping": clipping.no_clipping,
    "non-finite let through": clipping.non_finite_let_through,
    "per-layer clipping at C each": clipping.per_layer_clipping,
    "mean clipped, then multiplied": clipping.mean_clipped_then_multiplied,
    "divided by the realised size": steps.divided_by_realised_size,
    "noise before clipping": steps.noise_before_clipping,
    "divisor from private N": steps.divisor_from_private_size,
    "empty batches skipped": steps.empty_batches_skipped,
    "sampled without replacement": steps.sampled_without_replacement,
    "sampled at 2q": steps.sampled_at_double_rate,
    "ledger reset each round": books.ledger_reset_each_round,
    "sample epsilon in batch mode": books.sample_epsilon_in_batch_mode,
    "replace at the price of zero-out": books.replace_claimed_at_zero_out_price,
    "sampled replace at the price of removal": books.sampled_replace_priced_as_removal,
    "another arrived set under the old attempt": books.arrival_keeps_the_attempt,
    "everybody needs no new attempt": books.everybody_needs_no_new_attempt,
    "extension forgets what was spent": books.extension_forgets_what_was_spent,
    "weighted average with uniform noise": books.weighted_average_with_uniform_noise,
    "uploaded buffer": books.uploaded_buffer,
    "retry with old noise and new weights": books.retry_with_old_noise,
    "noise at sigma/n": noise.noise_divided_once_more,
    "divisor is who arrived": noise.divisor_is_who_arrived,
}
"""Name of each mutant and the function that applies it (monkeypatch, engine)."""
