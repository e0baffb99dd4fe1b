from __future__ import annotations

from megafish.audit.members import Members, choose_members
from megafish.audit.probes import load_canaries
from megafish.config import DataConfig
from megafish.data.corpus import Corpus, SampleStream, open_train, open_valid
from tests.audit.helpers import PROMPT, SEQUENCE_LENGTH, Runs

LENGTH = 20


def chosen(runs: Runs, consumed: int = 256, count: int = 6, length: int = LENGTH, seed: int = 0) -> Members:
    config = DataConfig.model_validate({"train": [str(runs.corpus)], "sequence_length": SEQUENCE_LENGTH})
    stream = SampleStream(open_train(config), SEQUENCE_LENGTH, 0)
    canaries = load_canaries(runs.corpus, 1.0)
    return choose_members(
        stream, open_valid(config), canaries, consumed=consumed, count=count, length=length, seed=seed
    )


def beginnings(runs: Runs, split: str) -> set[tuple[int, ...]]:
    data = Corpus(runs.corpus, split).data  # type: ignore[arg-type]
    return {tuple(data.document(i)[:LENGTH].tolist()) for i in range(len(data))}


def test_each_side_begins_documents_of_its_split(runs: Runs) -> None:
    found = chosen(runs)
    assert found.members and set(found.members) <= beginnings(runs, "train")
    assert found.non_members and set(found.non_members) <= beginnings(runs, "valid")
    assert not set(found.members) & set(found.non_members)
    canaries = {tuple(canary.tokens[:LENGTH].tolist()) for canary in load_canaries(runs.corpus, 1.0)}
    assert LENGTH < PROMPT and not canaries & {*found.members, *found.non_members}, "planted text is no fair member"


def test_the_choice_depends_on_the_seed_alone(runs: Runs) -> None:
    assert chosen(runs, count=2) == chosen(runs, count=2)
    assert chosen(runs, count=2) != chosen(runs, count=2, seed=1)


def test_only_what_was_read_is_a_member(runs: Runs) -> None:
    few, all_read = chosen(runs, consumed=2, count=100), chosen(runs, count=100)  # 256 samples are several passes
    assert len(few.members) < len(all_read.members)


def test_too_few(runs: Runs) -> None:
    found = chosen(runs, count=1000)
    assert [note.split(" for ")[0].split(" ", 1)[1] for note in found.notes] == [
        "training documents",
        "validation documents",
    ]
    assert all("instead of 1000" in note and f"{LENGTH} tokens" in note for note in found.notes)
    none = chosen(runs, consumed=2, length=SEQUENCE_LENGTH + 1)
    assert none.members == [] and none.notes[0].startswith("0 training documents")
