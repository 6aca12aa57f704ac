"""Placement: every gateway once, shares that fit, on one machine and on uneven clusters."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedray.errors import InputError
from fedray.pool.placement import Node, Placement, groups_of, place


def node(cpus: float, gpus: float = 0) -> Node:
    return Node(node_id=f"{cpus}-{gpus}", num_cpus=cpus, num_gpus=gpus)


nodes_strategy = st.lists(
    st.builds(
        node,
        st.one_of(st.integers(0, 64), st.floats(0, 8)),
        st.one_of(st.integers(0, 8), st.integers(0, 80_000).map(lambda units: units / 10_000)),
    ),
    min_size=1,
    max_size=6,
)
per_actor = st.one_of(st.just("auto"), st.integers(1, 50))


def _place(gateways: int, nodes: list[Node], size: int | str, use_gpus: bool) -> Placement:
    try:
        return place(gateways, nodes, size, use_gpus)
    except InputError:
        assume(False)
        raise


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 500), nodes_strategy, per_actor, st.booleans())
def test_place_hosts_every_gateway_once(gateways: int, nodes: list[Node], size: int | str, use_gpus: bool) -> None:
    placement = _place(gateways, nodes, size, use_gpus)
    assert [gateway for group in placement.groups for gateway in group] == list(range(gateways))
    assert all(len(group) > 0 for group in placement.groups)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 500), nodes_strategy, per_actor, st.booleans())
def test_place_never_asks_a_node_for_more_than_it_has(
    gateways: int, nodes: list[Node], size: int | str, use_gpus: bool
) -> None:
    placement = _place(gateways, nodes, size, use_gpus)
    cpus, gpus = Counter[int](), Counter[int | None]()
    for actor in placement.actors:
        cpus[actor.node] += round(actor.num_cpus * 10_000)
        gpus[actor.bundle] += round(actor.num_gpus * 10_000)
    assert all(units <= nodes[index].num_cpus * 10_000 for index, units in cpus.items())
    if use_gpus:
        assert sorted(gpus) == list(range(len(placement.gpu_bundles)))
        assert all(gpus[bundle] <= round(gpu * 10_000) for bundle, gpu in enumerate(placement.gpu_bundles))
        for index, one in enumerate(nodes):
            bundles = {actor.bundle for actor in placement.actors if actor.node == index}
            assert sum(placement.gpu_bundles[bundle or 0] for bundle in bundles) <= one.num_gpus + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 500), nodes_strategy, per_actor, st.booleans())
def test_place_gives_shares_of_whole_ten_thousandths(
    gateways: int, nodes: list[Node], size: int | str, use_gpus: bool
) -> None:
    for actor in _place(gateways, nodes, size, use_gpus).actors:
        for share in (actor.num_cpus, actor.num_gpus):
            assert round(share * 10_000) / 10_000 == share
        assert 0 < actor.num_cpus <= 1  # always asked for: without it Ray takes a whole core for life
        assert (actor.num_gpus > 0) == use_gpus


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), nodes_strategy, st.integers(1, 50))
def test_place_keeps_to_gateways_per_actor(gateways: int, nodes: list[Node], size: int) -> None:
    placement = _place(gateways, nodes, size, use_gpus=False)
    assert len(placement.actors) == -(-gateways // size)
    assert max(len(group) for group in placement.groups) <= size


def test_place_gives_a_gateway_its_own_actor_while_there_is_a_core() -> None:
    assert place(3, [node(4)], "auto", use_gpus=False).describe() == "3 actors × 1 gateway, 1 CPU each"


def test_place_groups_gateways_past_the_cores() -> None:
    assert place(16, [node(2)], "auto", use_gpus=False).describe() == "2 actors × 8 gateways, 1 CPU each"


def test_place_splits_cores_when_each_gateway_must_have_an_actor() -> None:
    placement = place(16, [node(2)], 1, use_gpus=False)
    assert {actor.num_cpus for actor in placement.actors} == {0.125}


def test_place_rounds_a_third_of_a_core_down() -> None:
    assert place(3, [node(1)], 1, use_gpus=False).actors[0].num_cpus == 0.3333


def test_place_gives_sixteen_gateways_a_sixteenth_of_one_gpu() -> None:
    placement = place(16, [node(2, 1)], "auto", use_gpus=True)
    assert len(placement.actors) == 16
    assert {(actor.num_gpus, actor.num_cpus, actor.bundle) for actor in placement.actors} == {(0.0625, 0.125, 0)}


def test_place_groups_gateways_past_sixteen_a_gpu() -> None:
    placement = place(100, [node(8, 2)], "auto", use_gpus=True)
    assert len(placement.actors) == 32
    assert {actor.num_gpus for actor in placement.actors} == {0.0625}


def test_place_rounds_a_third_of_a_gpu_down() -> None:
    assert place(3, [node(8, 1)], "auto", use_gpus=True).actors[0].num_gpus == 0.3333


def test_place_spreads_actors_over_all_gpus() -> None:
    placement = place(17, [node(32, 16)], "auto", use_gpus=True)
    assert sorted(Counter(actor.bundle for actor in placement.actors).values()) == [1] * 15 + [2]


def test_place_uses_gpus_of_uneven_nodes() -> None:
    nodes = [node(2, 1), node(4), node(64, 3)]
    placement = place(8, nodes, "auto", use_gpus=True)
    assert Counter(actor.node for actor in placement.actors) == {0: 2, 2: 6}
    assert {actor.num_cpus for actor in placement.actors} == {1.0}


def test_place_spreads_over_uneven_cores() -> None:
    placement = place(8, [node(2), node(6)], "auto", use_gpus=False)
    assert Counter(actor.node for actor in placement.actors) == {0: 2, 1: 6}


def test_place_does_not_straddle_nodes() -> None:
    placement = place(3, [node(1), node(1.5)], 1, use_gpus=False)  # 2.5 cores, but no node hosts two actors of 0.83
    assert {actor.num_cpus for actor in placement.actors} == {0.75}


def test_place_uses_what_the_driver_leaves_of_a_gpu() -> None:
    placement = place(16, [node(16, 0.9)], "auto", use_gpus=True)
    assert placement.gpu_bundles == (0.9,)
    assert {actor.num_gpus for actor in placement.actors} == {0.0562}


def test_place_leaves_a_gpu_that_is_nearly_taken() -> None:
    placement = place(20, [node(16, 1.05)], "auto", use_gpus=True)
    assert placement.gpu_bundles == (1.0,)
    assert {actor.num_gpus for actor in placement.actors} == {0.0625}


def test_place_numbers_only_the_gpus_that_are_used() -> None:
    placement = place(1, [node(2, 0.5), node(2, 1)], "auto", use_gpus=True)
    assert placement.gpu_bundles == (1.0,)
    assert (placement.actors[0].node, placement.actors[0].bundle) == (1, 0)


def test_place_is_quick_for_a_thousand_nodes() -> None:
    began = time.process_time()
    placement = place(1_000_000, [node(16)] * 1_000, "auto", use_gpus=False)
    assert len(placement.actors) == 16_000
    assert {actor.num_cpus for actor in placement.actors} == {1.0}
    assert time.process_time() - began < 5  # trying each share took minutes


def test_place_refuses_a_cluster_without_cores() -> None:
    with pytest.raises(InputError, match="the cluster has no CPU core for gateways"):
        place(1, [node(0)], "auto", use_gpus=False)


def test_place_refuses_more_actors_than_ten_thousandths() -> None:
    with pytest.raises(InputError, match="20001 actors do not fit on 2 CPU cores; raise --gateways-per-actor"):
        place(20_001, [node(2)], 1, use_gpus=False)


def test_groups_of_differ_by_one_at_most() -> None:
    assert groups_of(7, 3) == (range(3), range(3, 5), range(5, 7))
