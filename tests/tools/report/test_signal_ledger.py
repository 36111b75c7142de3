"""The ledger counts every group; only the drawn cells are thinned."""

from synthetic_run import dump_lines, write_run

from echorl_jax.tools.report.ledger import MAX_GROUPS, MAX_STEPS, build_ledger, read_ledger, spread


def group(index, correct, size=4, truncated=0, clip=False):
    return dict(index=index, correct=correct, size=size, truncated=truncated, clip=clip)


def ledger_of(tmp_path, *steps):
    rows = [{"step": i, "groups": groups} for i, groups in enumerate(steps)]
    dump_lines(tmp_path / "ledger.jsonl", rows)
    return build_ledger(read_ledger(tmp_path / "ledger.jsonl"))


def test_a_group_without_a_judged_rollout_is_left_out(tmp_path):
    ledger = ledger_of(tmp_path, [group(1, 0, size=0), group(2, 3, size=3)])
    assert ledger["steps"] == [[[0, 2, 3, 3, 0, 0]]] and ledger["totals"]["groups"] == 1


def test_moves_and_totals_match_hand_worked_counts(tmp_path):
    ledger = ledger_of(
        tmp_path,
        [group(7, 0), group(8, 2, clip=True)],
        [group(7, 1, truncated=2), group(9, 4, clip=True)],
        [group(7, 4, clip=True), group(8, 2)],
    )
    # Rows and columns: mixed, right, wrong. 7: wrong, mixed, right; 8: mixed, mixed; 9 came once.
    assert ledger["moves"] == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert ledger["totals"] == {
        "groups": 6,
        "steps": 3,
        "prompts": 3,
        "returning": 2,
        "clips": 3,
        "truncated": 1,
    }
    # A column runs from all wrong to all right; a row holds the visits of one prompt in order.
    assert ledger["steps"][0] == [[0, 7, 0, 4, 0, 0], [0, 8, 2, 4, 0, 1]]
    assert [cell[0] for cell in ledger["prompts"][1]] == [0, 1, 2]
    assert not ledger["thinned"]


def test_a_large_ledger_is_thinned_but_counted_in_full(tmp_path):
    steps = [[group(i, i % 5) for i in range(100)] for _ in range(300)]
    ledger = ledger_of(tmp_path, *steps)
    assert ledger["thinned"] and ledger["totals"]["groups"] == 30_000
    assert len(ledger["steps"]) == MAX_STEPS and len(ledger["steps"][0]) == MAX_GROUPS
    assert ledger["steps"][0][0][0] == 0 and ledger["steps"][-1][0][0] == 299
    right = sum(cell[2] == 4 for cell in ledger["steps"][0]) / MAX_GROUPS
    assert abs(right - 0.2) < 0.02


def test_broken_lines_and_groups_are_left_out(tmp_path):
    text = '{"step": 0, "groups": [{"index": 1}, 5, null]}\n{"step": 1}\n{"step": 2, "gro'
    (tmp_path / "ledger.jsonl").write_text(text)
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    assert build_ledger([]) is None
    assert read_ledger(tmp_path / "missing.jsonl") == []


def test_a_step_logged_again_counts_once(tmp_path):
    rows = [{"step": 3, "groups": [group(1, 0)]}, {"step": 3, "groups": [group(1, 4)]}]
    dump_lines(tmp_path / "ledger.jsonl", rows)
    visits = read_ledger(tmp_path / "ledger.jsonl")
    assert [visit.state for visit in visits] == ["right"]


def test_every_group_of_a_short_run_has_a_cell(tmp_path):
    run = write_run(tmp_path / "run", steps=20, prompts_per_step=8)
    visits = read_ledger(run / "samples" / "ledger.jsonl")
    drawn = build_ledger(visits)
    assert sorted(cell for column in drawn["steps"] for cell in column) == sorted(
        visit.cell() for visit in visits
    )


def test_spread_items_include_the_first_and_the_last():
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2] and spread([1, 2], 1) == [1] and spread([], 3) == []
