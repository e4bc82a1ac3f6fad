"""What a manifest says: three formats, one schema, and errors with their line."""

from __future__ import annotations

import json

import pytest

from diffgraft.app.batch.manifest import read_manifest
from diffgraft.app.batch.plan import Setup, batches, derived_seed, in_shard, make_job
from diffgraft.app.errors import ImageError, ManifestError

AWAY = {"plugin": "NegativeAway", "negative": "red", "scale": 0.5}
ROWS = [
    {"id": "ball", "prompt": "a red ball, sky", "steps": 4, "guidance": 2.5, "plugins": [AWAY]},
    {"id": "7", "prompt": 'a "blue" star\nnight', "seed": 3, "n": 2, "negative": "green"},
]


@pytest.fixture
def write(tmp_path):
    def write(text, name="jobs.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def rows_of(path, **defaults):
    manifest = read_manifest(path, defaults)
    assert not manifest.bad
    return [row for _, row in manifest.rows]


def setup_for(path, **options):
    return Setup(out=path.parent / "out", base=path.parent, model="picturebook", **options)


def test_three_formats_are_one(write):
    lines = write("\n".join(map(json.dumps, ROWS)))
    table = write(
        "id,prompt,steps,guidance,seed,n,negative,plugins\n"
        f'ball,"a red ball, sky",4,2.5,,,,"{json.dumps([AWAY]).replace(chr(34), chr(34) * 2)}"\n'
        '7,"a ""blue"" star\nnight",,,3,2,green,\n',
        "jobs.csv",
    )
    yaml = write(
        "- {id: ball, prompt: 'a red ball, sky', steps: 4, guidance: 2.5,\n"
        "   plugins: [{plugin: NegativeAway, negative: red, scale: 0.5}]}\n"
        '- {id: 7, prompt: "a \\"blue\\" star\\nnight", seed: 3, n: 2, negative: green}\n',
        "jobs.yaml",
    )
    expected = rows_of(lines)
    assert [row.model_dump(exclude_unset=True) for row in expected] == ROWS
    for other in (table, yaml):
        assert [row.model_dump() for row in rows_of(other)] == [row.model_dump() for row in expected]


def test_defaults_are_below_rows(write):
    path = write("defaults: {steps: 9, guidance: 3}\nrows:\n- {prompt: a}\n- {prompt: b, steps: 2}\n", "jobs.yml")
    first, second = rows_of(path, guidance=7.0)
    assert (first.steps, first.guidance, second.steps) == (9, 7.0, 2)
    assert (first.id, second.id) == ("3", "4")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_bom_blank_lines_and_line_ends(write, end):
    path = write(b"\xef\xbb\xbf" + end.join(['{"prompt": "a"}', "", '{"prompt": "b"}', ""]).encode())
    assert [row.id for row in rows_of(path)] == ["1", "3"]
    table = write(b"\xef\xbb\xbf" + end.join(["prompt,steps", "a,1", "b,2"]).encode(), "a.csv")
    assert [(row.id, row.steps) for row in rows_of(table)] == [("2", 1), ("3", 2)]


BAD_LINES = {
    '{"prompt": "a"': "not JSON",
    "[1, 2]": "a row is an object",
    '"text"': "a row is an object",
    '{"prompt": "a", "stepz": 3}': "unknown field 'stepz', did you mean 'steps'",
    '{"prompt": "a", "steps": "3"}': "steps: Input should be a valid integer",
    '{"prompt": "a", "steps": 0}': "steps: Input should be greater",
    '{"prompt": "a", "steps": 10000}': "steps: Input should be less",
    '{"prompt": "a", "n": 0}': "n: Input should be greater",
    '{"prompt": "a", "width": 0}': "width: Input should be greater",
    '{"prompt": "a", "seed": 3.7}': "seed: Input should be a valid integer",
    '{"prompt": "a", "seed": true}': "seed: Input should be a valid integer",
    '{"prompt": "a", "seed": 18446744073709551616}': "seed: Input should be less",
    '{"prompt": "a", "guidance": NaN}': "NaN is not a number",
    '{"prompt": "a", "guidance": 1e999}': "guidance: Input should be",
    '{"prompt": "a", "prompt": "b"}': "a field is given twice",
    '{"prompt": 5}': "prompt: Input should be a valid string",
    "{}": "task 'generate' needs prompt",
    '{"task": "paint", "prompt": "a"}': "task: Input should be",
    '{"task": "generate", "prompt": "a", "mask": "m.png"}': "takes no mask",
    '{"prompt": "a", "plugins": ["NegativeAway"]}': "plugins.0: Input should be a valid dictionary",
    '{"prompt": "a", "plugins": [{"plugin": "NegativAway"}]}': "did you mean 'NegativeAway'",
    '{"prompt": "a", "plugins": [{"plugin": "NegativeAway"}]}': "missing a required argument: 'negative'",
    '{"prompt": "a", "plugins": [{"plugin": "NegativeAway", "negative": "x", "scal": 1}]}': "did you mean 'scale'",
    '{"prompt": "' + "x" * 20_000 + '"}': "at most 10000 characters",
    '{"prompt": "a", "settings": {"scale": 2}}': "takes no settings",
    '{"task": "erase", "image": "a"}': "task 'erase' needs mask",
    '{"task": "erase", "image": "a", "mask": "b", "width": 64}': "takes no width",
    '{"task": "erase", "image": "a", "mask": "b", "settings": {"scal": 2}}': "erase has no scal; there are",
    '{"task": "stylize", "content": "a", "style": "b", "settings": {"prompt": ""}}': "has no prompt",
    "[" * 5000: "nested too deeply",
    '{"prompt": "a", "plugins": ' + '[{"x":' * 60 + "1" + "}]" * 60 + "}": "nested too deeply",
    '{"prompt": "' + "x" * 2**20 + '"}': "longer than",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_a_bad_line_is_told_with_its_number_and_the_others_stay(write, line):
    manifest = read_manifest(write('{"prompt": "a"}\n' + line + '\n{"prompt": "b"}\n'), {})
    assert [row.prompt for _, row in manifest.rows] == ["a", "b"]
    [bad] = manifest.bad
    assert bad.line == 2 and BAD_LINES[line] in bad.message and "\n" not in bad.message
    assert manifest.where(bad.line) == "jobs.jsonl:2"


def test_text_that_is_no_text(write):
    manifest = read_manifest(write(b'{"prompt": "\xff\xfe"}\n{"prompt": "b"}\n'), {})
    assert manifest.bad[0].message == "not UTF-8 text" and len(manifest.rows) == 1


WHOLE = {
    "empty": ("", "a.jsonl", "has no rows"),
    "unknown kind": ("x", "a.txt", r"a manifest is .jsonl"),
    "same id twice": (
        '{"prompt":"a","id":"x"}\n{"prompt":"b","id":"x"}',
        "a.jsonl",
        "a.jsonl:2: id 'x' is already on line 1",
    ),
    "id of another line": ('{"prompt":"a","id":"2"}\n{"prompt":"b"}', "a.jsonl", "already on line 1"),
    "names of one file": ('{"prompt":"a","id":"X"}\n{"prompt":"b","id":"x"}', "a.jsonl", "written by line 1 too"),
    "unicode forms": ('{"prompt":"a","id":"\\u00e9"}\n{"prompt":"b","id":"e\\u0301"}', "a.jsonl", "written by line 1"),
    "several pictures": ('{"prompt":"a","id":"x","n":2}\n{"prompt":"b","id":"x-1"}', "a.jsonl", "x-1.png would be"),
    "unknown column": ("prompt,stepz\na,1", "a.csv", "a.csv:1: unknown field 'stepz', did you mean 'steps'.; columns"),
    "column twice": ("prompt,prompt\na,b", "a.csv", "a.csv:1: a column is given twice"),
    "header that is not csv": ('"prompt"x,steps\na,1', "a.csv", "a.csv:1: not CSV"),
    "unknown default": ("defaults: {stepz: 9}\nrows: [{prompt: a}]", "a.yaml", "unknown field 'stepz', did you mean"),
    "key twice": ("- {prompt: a}\n- {prompt: a, prompt: b}", "a.yaml", "a.yaml:2: a field is given twice"),
    "python object": ("- !!python/object/apply:os.system ['true']", "a.yaml", "a.yaml:1: could not determine"),
    "alias bomb": ("- &a {prompt: x}\n- *a", "a.yaml", "a.yaml:2: aliases"),
    "not yaml": ("- {prompt: a", "a.yaml", "a.yaml:1: "),
    "unknown top": ("jobs: []", "a.yaml", "`defaults:` and `rows:`"),
    "no list": ("defaults: {}", "a.yaml", "^a.yaml has no list of rows"),
    "not text": (b"prompt\n\xff\xfe", "a.csv", "not UTF-8"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_manifest_that_cannot_be_used(write, name):
    text, file, message = WHOLE[name]
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(text, file), {})


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ManifestError, match="No such file"):
        read_manifest(tmp_path / "no.jsonl", {})


def test_cells_beyond_the_columns(write):
    manifest = read_manifest(write("prompt,steps\na,b,c\nd,2\n", "a.csv"), {})
    assert manifest.bad[0].line == 2 and "more cells" in manifest.bad[0].message and len(manifest.rows) == 1


def test_a_line_that_is_not_csv_is_one_bad_row(write):
    manifest = read_manifest(write('prompt,steps\na,1\n"b"c,2\n\n"d\ne",2\nf,3\n', "a.csv"), {})
    assert [(line, row.id) for line, row in manifest.rows] == [(2, "2"), (5, "5"), (7, "7")]
    assert manifest.rows[1][1].prompt == "d\ne"
    [bad] = manifest.bad
    assert bad.line == 3 and bad.message.startswith("not CSV")


def test_a_bad_row_does_not_take_the_name_of_a_good_one(write):
    """Ids that count from 0 are not the lines' numbers."""
    lines = [json.dumps({"id": str(i), "prompt": "a"}) for i in range(4)]
    manifest = read_manifest(write("\n".join([*lines[:1], '{"id": "1", "prompt"', *lines[2:], "["])), {})
    assert [row.id for _, row in manifest.rows] == ["0", "2", "3"]
    assert [(bad.id, bad.line) for bad in manifest.bad] == [("line 2", 2), ("5", 5)]


@pytest.mark.parametrize("name", ["stepz", "id", ""])
def test_a_default_that_no_row_has_is_told(write, name):
    with pytest.raises(ManifestError, match="the defaults: "):
        read_manifest(write('{"prompt": "a"}'), {name: 3})


def test_yaml_holds_what_json_holds(write):
    rows = "- {prompt: 2020-01-01}\n- {prompt: a, plugins: [{plugin: NegativeAway, negative: %s}]}\n- {prompt: b}\n"
    for strange in ("!!set {a}", "!!binary aGk=", "!!timestamp 2020-01-01", "{1: 0.5, a: 1}"):
        manifest = read_manifest(write(rows % strange, "a.yaml"), {})
        assert [row.prompt for _, row in manifest.rows] == ["2020-01-01", "b"]
        assert manifest.bad[0].line == 2 and "quotes" in manifest.bad[0].message


def test_everything_wrong_with_a_row_is_told_at_once(write):
    row = {"task": "erase", "image": "a", "settings": {"scal": 2}, "plugins": [{"plugin": "No"}, {"plugin": "None"}]}
    [bad] = read_manifest(write(json.dumps(row)), {}).bad
    for part in ("needs mask", "erase has no scal", "no plugin 'No'", "no plugin 'None'"):
        assert part in bad.message
    [bad] = read_manifest(write('{"prompt": 3, "steps": 0, "colour": "red"}'), {}).bad
    assert all(part in bad.message for part in ("prompt: ", "steps: ", "unknown field 'colour'"))


def jobs_of(path, seed=0, **options):
    manifest = read_manifest(path, {})
    return [make_job(row, line, setup_for(path, **options), seed) for line, row in manifest.rows]


def test_seeds_come_from_the_run_and_the_id(write):
    rows = [json.dumps({"id": f"r{i}", "prompt": "a"}) for i in range(8)]
    forth = {job.id: job.seed for job in jobs_of(write("\n".join(rows)))}
    back = {job.id: job.seed for job in jobs_of(write("\n".join(reversed(rows))))}
    assert forth == back and len(set(forth.values())) == 8
    assert forth["r3"] == derived_seed(0, "r3") != derived_seed(1, "r3")
    assert jobs_of(write('{"prompt": "a", "seed": 7}'))[0].seed == 7
    assert jobs_of(write('{"prompt": "a", "seed": -1}'))[0].seed == derived_seed(0, "1")


def test_the_hash_sees_what_changes_a_picture(write, tmp_path):
    (tmp_path / "m.png").write_bytes(b"one")
    row = {"id": "x", "prompt": "a", "plugins": [{"plugin": "NegativeAway", "negative": "m.png"}]}
    base = jobs_of(write(json.dumps(row)))[0].hash
    assert jobs_of(write("\n\n" + json.dumps(row)))[0].hash == base
    assert jobs_of(write(json.dumps(row)), device="cpu", batch_size=4, threads=2)[0].hash == base
    for change in ({"prompt": "b"}, {"steps": 3}, {"n": 2}, {"seed": 1}, {"id": "y"}, {"model": "other"}):
        assert jobs_of(write(json.dumps(row | change)))[0].hash != base
    assert jobs_of(write(json.dumps(row)), seed=1)[0].hash != base
    assert jobs_of(write(json.dumps(row)), dtype="bfloat16")[0].hash != base


def test_every_picture_that_a_row_reads_is_known(write, tmp_path):
    """Lists, mappings, layouts and contents too: each is in the hash, and its folder in no metadata."""
    (tmp_path / "in").mkdir()
    for name in "abcde":
        (tmp_path / "in" / f"{name}.png").write_bytes(b"old")
    layout = {"ball": "in/a.png", "star": "in/b.png"}
    plugins = [
        {"plugin": "AttentionSegregation", "concepts": ["ball", "star"], "layout": layout},
        {"plugin": "AttentionDistillation", "style": ["in/c.png"], "content": "in/d.png"},
        {"plugin": "SelfAttentionRedirection", "mask": ["in/e.png"]},
        {"plugin": "AttentionSegregation", "concepts": ["ball"], "layout": "auto"},
    ]
    path = write(json.dumps({"prompt": "a", "plugins": plugins}))
    [job] = jobs_of(path)
    assert "in/" not in json.dumps(job.described(0)) and job.described(0)["plugins"][0]["layout"]["star"] == "b.png"
    for name in "abcde":
        (tmp_path / "in" / f"{name}.png").write_bytes(b"newer")
        [changed] = jobs_of(path)
        assert changed.hash != job.hash
        job = changed


@pytest.mark.parametrize("path", ["/dev/zero", ".", "no.png", "a\0b", "x" * 4000])
def test_only_files_are_read(write, path):
    with pytest.raises(ImageError, match="cannot be read"):
        jobs_of(write(json.dumps({"task": "erase", "image": path, "mask": path})))


def test_every_row_is_in_one_shard():
    names = [f"row {i}" for i in range(200)]
    for count in (1, 2, 3, 7):
        assert all(sum(in_shard(name, i, count) for i in range(count)) == 1 for name in names)
        assert all(in_shard(name, 0, count) == in_shard(name, count, count) for name in names)
    assert 60 < sum(in_shard(name, 0, 2) for name in names) < 140


def test_what_is_alike_is_together_and_models_follow_each_other(write):
    settings = [
        {"steps": 2},
        {"steps": 3},
        {"model": "other"},
        {"steps": 2},
        {"model": "other"},
        {"steps": 3},
        {"steps": 2},
    ]
    jobs = jobs_of(write("\n".join(json.dumps({"prompt": f"p{i}"} | s) for i, s in enumerate(settings))))
    assert [[job.id for job in batch] for batch in batches(jobs, 2)] == [["1", "4"], ["7"], ["2", "6"], ["3", "5"]]
    assert [[job.id for job in batch] for batch in batches(jobs, 1)] == [
        ["1"],
        ["4"],
        ["7"],
        ["2"],
        ["6"],
        ["3"],
        ["5"],
    ]
