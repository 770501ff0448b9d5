"""A log with a damaged end."""

import pytest
from etils import epath
from hypothesis import strategies as st
from properties import holds_for, sizes

from retnet_jax.runs.json_lines import JsonLines, records_in


def written_lines(path, count):
    lines = JsonLines(path, pytest.fail)
    records = [{"step": step, "loss": step / 8, "note": "é{}\n"} for step in range(1, count + 1)]
    for record in records:
        lines.append(record)
    return records


@sizes(150, 3000)
def test_a_damaged_end_of_a_log_costs_no_earlier_record_and_is_said(most, tmp_path):
    """What a crash leaves: a file cut off, or with zeros or old blocks where its end should be."""
    path = epath.Path(tmp_path / "metrics.jsonl")

    @holds_for(
        most,
        count=st.integers(1, 5),
        kind=st.sampled_from(["cut", "zeros", "zeros behind", "garbage"]),
        place=st.integers(0, 10**6),
        garbage=st.binary(min_size=1, max_size=40),
    )
    def said_and_kept(count, kind, place, garbage):
        path.unlink(missing_ok=True)
        records = written_lines(path, count)
        intact = path.read_bytes()
        place %= len(intact)
        damaged = {
            "cut": intact[:place],
            "zeros": intact[:place] + bytes(len(intact) - place),
            "zeros behind": intact + bytes(place % 50 + 1),
            "garbage": intact[:place] + garbage,
        }[kind]
        path.write_bytes(damaged)
        whole = (intact if kind == "zeros behind" else intact[:place]).count(b"\n")
        said = []
        lines = JsonLines(path, said.append, last_step=count)
        assert records_in(path)[:whole] == records[:whole]
        assert len(records_in(path)) == whole or said
        ends_a_line = damaged.endswith(b"\n") and kind == "cut"
        assert bool(said) != (ends_a_line or damaged == b"" or damaged == intact)
        lines.append({"step": count + 1})
        assert records_in(path)[:whole] == records[:whole]
        assert records_in(path)[-1] == {"step": count + 1}
