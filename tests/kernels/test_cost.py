"""The model of the loss's cost at points computed by hand, and beside what others published."""

from __future__ import annotations

import pytest

from megafish_kernels import cost, report
from megafish_kernels.cost import Cost, Gpu, Phase, Shape

LLAMA_8B = Shape("Llama-3.1-8B", 8192, 128256, 4096)
NVD = 8192 * 128256 * 4096
MIB = 2**20
ALL = 2 * 8192 * 128256
"""Bytes that hold the logits of all tokens."""


def phase(entry: Cost, name: str) -> Phase:
    (found,) = [phase for phase in entry.phases if phase.name == name]
    return found


@pytest.mark.parametrize(
    ("entry", "units"),
    [
        # (8 - 2 c) r N V D, r = 1 - 1 / k: logits of c V columns are kept, the others computed again.
        (cost.megafish(LLAMA_8B, None, 1), 8),
        (cost.megafish(LLAMA_8B, 4, 1), 6),
        # 1 GiB is 65536 columns of 8192 rows, of which 8192 are the slab's; of 6144 rows it is 87381 columns.
        (cost.megafish(LLAMA_8B, None), 8 - 2 * 57344 / 128256),
        (cost.megafish(LLAMA_8B, 4), (8 - 2 * 57344 / 128256) * 3 / 4),
        (cost.megafish(LLAMA_8B, 4, host_count=True), (8 - 2 * 79104 / 128256) * 3 / 4),
        (cost.megafish(LLAMA_8B, 4, ALL), 4.5),
        (cost.megafish(LLAMA_8B, 2, ALL, host_count=True), 3),
        (cost.cce(LLAMA_8B, 4), 6),
        (cost.cce(LLAMA_8B, None, fp32=True), 8),
        (cost.liger(LLAMA_8B), 6),
        (cost.quack(LLAMA_8B), 6),
        (cost.torch_chunked(LLAMA_8B), 6),
        (cost.full_logits(LLAMA_8B), 6),
    ],
)
def test_flops(entry: Cost, units: float) -> None:
    assert entry.flops == pytest.approx(units * NVD, rel=1e-12)


def test_memory_of_megafish_at_llama_8b() -> None:
    memory = {name: size / MIB for name, size in cost.megafish(LLAMA_8B, 4).memory.items()}
    # The host does not know how many rows are kept: there is one for each of 8192 tokens.
    assert memory["rows taken out"] == 64  # 8192 x 4096 x 2 B
    assert memory["fp32 gradient of the hidden states"] == 128
    assert memory["gradient of the head"] == 1002  # 128256 x 4096 x 2 B
    assert memory["kept logits"] == 896  # 8192 x 57344 x 2 B
    assert memory["slab of the logits' gradient"] == 128  # 8192 x 8192 x 2 B
    assert memory["their tiles' tops"] == 14  # 8192 x 448 x 4 B
    assert memory["figures of the splits"] == 0.75  # 8192 x 8 splits x 3 x 4 B
    assert sum(memory.values()) == pytest.approx(2233.25)


def test_memory_where_the_host_knows_the_count() -> None:
    memory = {name: size / MIB for name, size in cost.megafish(LLAMA_8B, 4, host_count=True).memory.items()}
    assert memory["rows taken out"] == 48  # 6144 x 4096 x 2 B
    assert memory["fp32 gradient of the hidden states"] == 96
    assert memory["kept logits"] == 927  # 6144 x 79104 x 2 B
    assert memory["slab of the logits' gradient"] == 96
    whole = cost.megafish(LLAMA_8B, None, host_count=True)
    assert whole.memory["rows taken out"] == 0
    assert not {"rows taken out", "rows back to their places"} & {phase.name for phase in whole.phases}


def test_memory_where_few_logits_are_kept_is_largest_after_the_products() -> None:
    memory = cost.megafish(LLAMA_8B, 4, 1).memory
    assert "slab of the logits' gradient" not in memory  # 128 columns, 2 MiB
    assert memory["gradient of the rows"] / MIB == memory["gradient of the hidden states"] / MIB == 64


def test_memory_of_the_peers_at_llama_8b() -> None:
    assert cost.liger(LLAMA_8B).memory["logits of a chunk"] / MIB == pytest.approx(62.6, abs=0.05)  # 256 rows
    assert cost.liger(LLAMA_8B, copies=True).memory["V x D copies"] / MIB == 3006
    assert cost.quack(LLAMA_8B).memory["logits of a chunk"] / MIB == 1002  # 4096 rows
    assert cost.quack(LLAMA_8B).memory["fp32 gradient of the head"] / MIB == 2004
    more = cost.cce(LLAMA_8B, None, fp32=True).memory["gradient of the head"]
    assert more / MIB == 2004


HEAD, HIDDEN, LOGITS = 128256 * 4096 * 2, 6144 * 4096 * 2, 6144 * 128256 * 2


def test_traffic_of_megafish_at_llama_8b() -> None:
    entry = cost.megafish(LLAMA_8B, 4)
    kept, tops = 6144 * 57344 * 2, 6144 * 448 * 4
    # The head once for every 1024 of 6144 rows.
    assert phase(entry, "logits and their figures").traffic == HIDDEN + 6 * HEAD + kept + tops
    assert phase(entry, "gradient of the kept logits").traffic == 2 * kept + tops
    # 70912 other columns: eight slabs of 8192 and one of 5376.
    again = phase(entry, "other logits again, and their gradient").traffic
    assert again == 9 * HIDDEN + 6 * 70912 * 4096 * 2 + LOGITS - kept
    # The kept columns and nine slabs; the first writes the fp32 sum, each other one reads and writes it.
    added = phase(entry, "gradient of the hidden states").traffic - LOGITS - 6 * HEAD
    assert added == (4 + 9 * 8) * 6144 * 4096
    # Rows of the head by 1024: 56 groups of the kept columns, 8 of a whole slab, 6 of the last.
    assert phase(entry, "gradient of the head").traffic == LOGITS + (56 + 8 * 8 + 6) * HIDDEN + HEAD
    # 8192 rows are written, of which 6144 were read; what has no token repeats the first row.
    assert phase(entry, "rows taken out").traffic == HIDDEN + 8192 * 4096 * 2


def test_a_librarys_products_read_their_operands_once() -> None:
    entry = cost.megafish(LLAMA_8B, 4, host_count=True)
    # 79104 columns kept, 49152 in six slabs.
    assert phase(entry, "gradient of the hidden states").traffic == LOGITS + HEAD + (4 + 6 * 8) * 6144 * 4096
    assert phase(entry, "gradient of the head").traffic == LOGITS + 7 * HIDDEN + HEAD
    assert phase(entry, "rows taken out").traffic == 2 * HIDDEN


def test_a_pass_is_a_read_or_a_write_of_all_logits() -> None:
    # Their gradient is written once and read twice; kept ones are written and read besides.
    assert cost.megafish(LLAMA_8B, 4, 1).logit_passes == 3
    assert cost.megafish(LLAMA_8B, 4, ALL).logit_passes == 5


@pytest.mark.parametrize("tokens", [4096, 8192, 16384, 32768])
def test_liger_has_as_many_chunks_whatever_the_tokens(tokens: int) -> None:
    entry = cost.liger(Shape("", tokens, 128256, 4096))
    assert entry.memory["logits of a chunk"] == tokens // 32 * 128256 * 2
    # Each of 32 chunks reads the head twice, and reads and writes its gradient.
    head = 128256 * 4096 * 2
    assert phase(entry, "gradient of the hidden states").traffic == 2 * tokens * (128256 + 4096) + 32 * head
    assert phase(entry, "gradient of the head").traffic == 2 * tokens * (128256 + 4096) + 32 * 2 * head


def test_a_phase_takes_the_longer_of_its_products_and_its_bytes() -> None:
    gpu = Gpu("one", 100.0, 10.0, "")
    entry = Cost("", (Phase("products", 1000, 1), Phase("bytes", 0, 40), Phase("both", 500, 60)), {}, 0)
    assert entry.seconds(gpu, 0.5, 0.25) == 1000 / 50 + 40 / 2.5 + 60 / 2.5
    assert entry.seconds(gpu, 1, 1) == 10 + 4 + 6


@pytest.mark.parametrize(("name", "rows"), [("A100", 306), ("H100", 591), ("H200", 412), ("B200", 562)])
def test_rows_at_which_a_product_and_its_weight_take_as_long(name: str, rows: int) -> None:
    # A fp32 sum is read and written and the weight read twice for every chunk of m rows: 2 F / BW of them balance.
    gpu = cost.gpu(name)
    assert round(2 * gpu.flops / gpu.bandwidth) == rows


@pytest.mark.parametrize(("k", "kept"), [(None, 8192), (4, 6144), (50, 8028), (3, 5461)])
def test_kept_tokens(k: int | None, kept: int) -> None:
    assert LLAMA_8B.kept(k) == kept


@pytest.mark.parametrize("shape", cost.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("gpu", cost.GPUS, ids=lambda gpu: gpu.name)
def test_no_method_beats_the_peak(shape: Shape, gpu: Gpu) -> None:
    for k in (None, 4, 50):
        for method in cost.METHODS.values():
            entry = method(shape, k)
            assert entry.seconds(gpu) >= entry.flops / (cost.PRODUCT_FRACTION * gpu.flops) * (1 - 1e-12)
            assert entry.peak_memory >= 2 * (shape.tokens + shape.vocab) * shape.dim


def test_gradients_alone_at_gemma_are_what_cce_published() -> None:
    # arXiv 2411.09009v2, table 1: both gradients in bfloat16 are 1161 MB, CCE needs 1162 to 1164.
    assert cost.cce(cost.SHAPES[2], None).peak_memory / MIB == pytest.approx(1161, abs=1)


def test_the_model_is_near_or_below_what_was_published() -> None:
    # Locks, launches and waiting are not in it: it may be far below, but hardly above.
    for entry in cost.PUBLISHED:
        modelled = cost.modelled(entry)
        if modelled is not None:
            assert modelled[0] < 1.2 * entry.milliseconds, entry


def test_tables_mark_the_model() -> None:
    tables = report.model_tables(peers=True)
    assert len(tables) == len(cost.SHAPES) + 1
    for table in tables[:-1]:
        assert "model, not a measurement" in table.note
        assert [name for name in table.header if " ms" in name] == [f"{gpu.name} model ms" for gpu in cost.GPUS]
    published = tables[-1]
    assert "ms (model)" in published.header
    assert all(row[-1] for row in published.rows)
    lines = published.text().splitlines()
    assert len({len(line) for line in lines[3:4]}) == 1
    assert published.text(markdown=True).count("\n|") == len(published.rows) + 2
