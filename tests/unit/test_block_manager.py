"""No KV block is ever lost, shared by mistake or found by the wrong request, whatever the order of operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from paceline.cache.block_manager import BlockManager

SIZE = 4


@dataclass(eq=False)
class Holder:
    """A request as the manager sees it."""

    salt: str
    tokens: list[int]
    table: list[int]
    hashes: list[bytes]
    computed: int = 0


def hold(manager: BlockManager, tokens: list[int], salt: str = "", *, computed: int | None = None) -> Holder:
    """Match, allocate, compute and publish."""
    table, hashes = manager.match_prefix(tokens, salt)
    holder = Holder(salt, tokens, table, hashes)
    assert manager.grow(holder.table, len(tokens))
    manager.publish(table, hashes, tokens, len(tokens) if computed is None else computed, salt)
    return holder


@pytest.mark.parametrize("seed", range(12))
def test_accounting_under_random_operations(seed: int) -> None:
    """A shadow pool remembers what each block holds: a match must find exactly its own tokens and salt."""
    rng = np.random.default_rng(seed)
    manager = BlockManager(24, SIZE, prefix_caching=seed % 4 != 3)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}  # block -> salt and all tokens up to its end
    texts = np.cumsum(rng.integers(0, 2, (3, 30)), axis=1) // 4  # few beginnings, some in common
    holders: list[Holder] = []
    hits = evictions = 0
    for _ in range(600):
        action = rng.choice(["start", "extend", "shrink", "end", "clear"], p=[0.35, 0.3, 0.1, 0.24, 0.01])
        if action == "start":
            salt = str(rng.choice(["", "a"]))
            tokens = texts[int(rng.integers(3)), : int(rng.integers(1, 30))].tolist()
            before = manager.counts()
            table, hashes = manager.match_prefix(tokens, salt)
            hits += len(table)
            assert len(table) * SIZE < len(tokens)
            for i, block in enumerate(table):
                assert content[block] == (salt, tuple(tokens[: (i + 1) * SIZE]))
            room = manager.num_available
            fits = manager.grow(table, len(tokens))
            assert fits == (manager.blocks_for(len(tokens)) - len(hashes) <= room)
            if fits:
                evictions += manager.counts().cached < before.cached - len(hashes)
                holders.append(Holder(salt, tokens, table, hashes, len(hashes) * SIZE))
            else:
                manager.release(table)
                assert table == []
        elif action == "clear":
            manager.clear_cache()
            assert manager.counts().cached == 0
        elif holders:
            holder = holders[int(rng.integers(len(holders)))]
            if action == "extend":  # compute some more, with a few draft tokens behind the committed ones
                drafts = int(rng.integers(0, 9))
                if manager.grow(holder.table, len(holder.tokens) + drafts):
                    holder.computed = int(rng.integers(holder.computed, len(holder.tokens) + 1))
                    full = holder.computed // SIZE
                    for i in range(len(holder.hashes), full):
                        content[holder.table[i]] = (holder.salt, tuple(holder.tokens[: (i + 1) * SIZE]))
                    manager.publish(holder.table, holder.hashes, holder.tokens, holder.computed, holder.salt)
            elif action == "shrink":
                manager.shrink(holder.table, len(holder.tokens))
            else:
                manager.release(holder.table)
                holders.remove(holder)
        manager.check()
        counts = manager.counts()
        assert counts.used == len({block for h in holders for block in h.table})
        assert counts.free + counts.used + counts.cached == 24
        assert manager.num_available == counts.free + counts.cached
        own = [b for h in holders for b in h.table[len(h.hashes) :]]
        assert len(own) == len(set(own)), "two requests write into one block"
    assert (hits > 50 and evictions > 1) == manager.prefix_caching
    for holder in holders:
        manager.release(holder.table)
    manager.check()
    assert manager.counts().used == 0


def test_grow_is_all_or_nothing() -> None:
    manager = BlockManager(3, SIZE)
    table: list[int] = []
    assert not manager.grow(table, 13)
    assert table == []
    assert manager.grow(table, 12)
    assert manager.grow(table, 5), "nothing to do"
    assert len(table) == 3
    manager.shrink(table, 5)
    assert len(table) == 2
    manager.shrink(table, 5)
    assert manager.counts().free == 1


def test_a_released_prefix_is_found_again_and_shared() -> None:
    manager = BlockManager(8, SIZE)
    first = hold(manager, list(range(10)))
    second = hold(manager, list(range(10)))
    assert second.table[:2] == first.table[:2]
    assert second.table[2] != first.table[2], "the unfinished block is nobody else's"
    manager.release(first.table)
    assert manager.counts().used == 3
    manager.release(second.table)
    assert manager.counts().cached == 2


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12])
def test_the_whole_prompt_never_matches(length: int) -> None:
    manager = BlockManager(8, SIZE)
    tokens = list(range(length))
    manager.release(hold(manager, tokens).table)
    table, hashes = manager.match_prefix(tokens, "")
    assert len(table) == len(hashes) == (length - 1) // SIZE
    manager.release(table)


def test_salts_share_nothing() -> None:
    manager = BlockManager(8, SIZE)
    manager.release(hold(manager, list(range(10)), "alice").table)
    assert manager.match_prefix(list(range(10)), "bob") == ([], [])
    assert manager.match_prefix(list(range(10)), "") == ([], [])
    table, _ = manager.match_prefix(list(range(10)), "alice")
    assert len(table) == 2
    manager.release(table)


def test_the_hash_depends_on_all_that_came_before() -> None:
    """The same block content at another place, or behind another beginning, is another block."""
    manager = BlockManager(16, SIZE)
    manager.release(hold(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9]).table)
    assert manager.match_prefix([5, 6, 7, 8, 9], "")[0] == []
    table, _ = manager.match_prefix([0, 2, 3, 4, 5, 6, 7, 8, 9], "")
    assert table == []
    table, _ = manager.match_prefix([1, 2, 3, 4, 0, 6, 7, 8, 9], "")
    assert len(table) == 1
    manager.release(table)


def test_only_full_and_computed_blocks_are_published() -> None:
    manager = BlockManager(8, SIZE)
    tokens = list(range(12))
    holder = hold(manager, tokens, computed=7)
    assert len(holder.hashes) == 1
    manager.publish(holder.table, holder.hashes, tokens, 8, "")
    assert len(holder.hashes) == 2
    manager.release(holder.table)
    assert (manager.counts().free, manager.counts().cached) == (6, 2)


def test_equal_content_computed_twice_is_found_once() -> None:
    manager = BlockManager(8, SIZE)
    tokens = list(range(9))
    tables: list[list[int]] = [[], []]
    for table in tables:  # both start before either has published
        manager.grow(table, 9)
    for table in tables:
        manager.publish(table, [], tokens, 9, "")
    found, _ = manager.match_prefix(tokens, "")
    assert found == tables[0][:2]
    for table in (found, *tables):
        manager.release(table)
    assert manager.counts().cached == 2
    manager.check()


def test_the_oldest_is_evicted_first_and_leaves_before_their_parents() -> None:
    manager = BlockManager(4, SIZE)
    old, new = [0] * 9, [1] * 9
    manager.release(hold(manager, old).table)
    manager.release(hold(manager, new).table)
    table: list[int] = []
    assert manager.grow(table, SIZE)  # evicts the last block of the older prefix only
    kept, _ = manager.match_prefix(old, "")
    assert len(kept) == 1
    manager.release(kept)  # now the most recently used
    manager.grow(table, 3 * SIZE)
    assert manager.match_prefix(new, "")[0] == []
    kept, _ = manager.match_prefix(old, "")
    assert len(kept) == 1
    for held in (kept, table):
        manager.release(held)
    manager.check()


def test_a_double_release_is_caught() -> None:
    manager = BlockManager(4, SIZE)
    table: list[int] = []
    manager.grow(table, 4)
    copy = list(table)
    manager.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        manager.release(copy)


def test_check_sees_a_leak_and_a_double_free() -> None:
    manager = BlockManager(4, SIZE)
    block = manager._free.pop()
    with pytest.raises(AssertionError, match="leaked"):
        manager.check()
    manager._free += [block, block]
    with pytest.raises(AssertionError):
        manager.check()


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = BlockManager(8, SIZE, prefix_caching=False)
    holder = hold(manager, list(range(10)))
    assert holder.hashes == []
    manager.release(holder.table)
    assert manager.counts().free == 8
    assert manager.match_prefix(list(range(10)), "") == ([], [])
