"""The certificate: what trial records come to, whatever their order, and that it is as it was written."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.stress.certificate import assemble, read_certificate, write
from stress.examples import example_certificate, example_inputs, example_records, example_tax


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_permutation_of_the_records_gives_the_same_bytes(random) -> None:
    records = example_records()
    random.shuffle(records)
    assert json.dumps(assemble(records, example_inputs(), example_tax())) == json.dumps(example_certificate())


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "certificate.json", example_certificate())
    assert read_certificate(tmp_path / "certificate.json") == example_certificate()
