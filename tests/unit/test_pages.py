"""Memory in large pages behaves as any other."""

from __future__ import annotations

import mmap

import pytest
import torch

from paceline.cache import pages
from paceline.cache.pages import Arena, zeros


@pytest.fixture(params=["large", "refused", "plain"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with large pages, if this one has them, one that refuses them, and one that does not know them."""
    if request.param == "plain":
        monkeypatch.setattr(pages, "_HUGE", None)
    elif not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no large pages")
    elif request.param == "refused":
        monkeypatch.setattr(pages, "_HUGE", 1 << 20)  # advice that no system knows


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_zeros_are_zero_and_can_be_written(dtype: torch.dtype) -> None:
    for shape in [(), (1,), (3, 5), (0, 4), (1 << 20, 3)]:
        found = zeros(shape, dtype)
        assert found.shape == shape
        assert found.dtype is dtype
        assert not found.any()
        found += 1
        assert found.all()


@pytest.mark.usefixtures("system")
def test_an_arenas_pieces_are_copies_that_do_not_overlap() -> None:
    arena = Arena(piece=1 << 12)
    sources = [torch.randn(n, 7).to(t) for n in (1, 3, 90, 1000, 2) for t in (torch.float32, torch.float16)]
    found = [arena.copy(source.t()) for source in sources]
    for source, copied in zip(sources, found, strict=True):
        assert torch.equal(copied, source.t())
        assert copied.is_contiguous()
        assert copied.data_ptr() % 64 == 0
    del arena
    for copied in found:
        copied.zero_()
    assert not any(copied.any() for copied in found)
