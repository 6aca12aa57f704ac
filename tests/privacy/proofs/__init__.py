"""The laws of privacy.md, each as one function that passes on the real mechanism and fails on a mutated one.

Every proof runs real code of fedray through public calls and raises AssertionError. Honest tests call them as they are,
mutant tests under a patch. Each statistic has alpha = 1e-6 (see `checks`); all draws have fixed seeds. What is charged
and printed (T11) is proven in `tests.privacy.books`.
"""
