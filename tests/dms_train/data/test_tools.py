"""Chats with tools: the template sees of a row what its JSON said, whatever kind of file it came from, and the options that were asked for."""

import copy
import json

import pytest
from dms_train import cache_teacher
from dms_train.data import hub
from dms_train.data.jsonl import JsonLines
from dms_train.data.settings import Data, Origin, Prompts
from dms_train.data.shards import Parquet, Record
from dms_train.data.tokenization import columns_of, make_render
from dms_train.generate_data import prompt_render
from dms_train.generated_file import GeneratedFile, GeneratedRecord
from dms_train.recipe import GenerateRecipe, RetrofitRecipe
from dms_train.recipe_file import load_recipe
from dms_train.run_folder import differences

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tool(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": f"call {name}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "name": name},
        {"role": "assistant", "content": "It is done."},
    ]


# Each call has arguments that the others have not, at two depths; a list may hold null, and an object nothing.
ROWS = [
    {"chat": chat("weather", {"city": "Bern", "when": {"day": "Monday"}}), "tools": [tool("weather", city="string")]},
    {"chat": chat("add", {"numbers": [1, None, 3]}), "tools": [tool("add", numbers="array"), tool("stop")]},
    {"chat": chat("stop", {}), "tools": []},
    {"chat": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello."}], "tools": None},
]
ORIGIN = {"source": "jsonl", "path": "x.jsonl", "messages": "chat", "tools": "tools"}


@pytest.fixture(scope="session")
def chatty(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


def expected(chatty, row, **options):
    return chatty.apply_chat_template(row["chat"], tools=row["tools"] or None, tokenize=False, **options)


def texts_of(chatty, shards, origin):
    render = make_render(chatty, origin)
    made = [rendered for shard in range(shards.num_shards) for rendered in render(_rows(shards.open(shard)))]
    assert [rendered.problem for rendered in made] == [""] * len(made)
    return [chatty.decode(rendered.ids) for rendered in made]


def _rows(shard):
    return shard.records(0)


def _write(kind, folder, rows):
    """Rows as a source's files -> what reads them."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    origin = Origin(**{**ORIGIN, "path": str(folder), "source": {"jsonl": "jsonl", "parquet": "parquet"}.get(kind.split()[0], "dataset")})
    if kind in ("jsonl", "dataset of json", "stream of json"):
        (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet of json":
        features = datasets.Features({"chat": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())})
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "x.parquet")
    else:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "x.parquet")
    if kind == "jsonl":
        return JsonLines(origin), origin
    if kind.startswith("parquet"):
        return Parquet(origin, columns_of(origin), skips=False), origin
    origin = Origin(**{**origin.model_dump(), "streaming": kind.startswith("stream")})
    return hub.load(origin, columns_of(origin)), origin


KINDS = ["jsonl", "parquet", "parquet of json", "dataset", "stream", "dataset of json", "stream of json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_reaches_the_template_as_its_json_was(chatty, tmp_path, kind):
    shards, origin = _write(kind, tmp_path / "d", ROWS)
    if kind == "parquet":
        # What this is about: to Arrow, every call has every argument.
        (call,) = shards.open(0).table["chat"].to_pylist()[0][1]["tool_calls"]
        assert call["function"]["arguments"] == {"city": "Bern", "when": {"day": "Monday"}, "numbers": None}
    found = texts_of(chatty, shards, origin)
    assert found == [expected(chatty, row) for row in ROWS]
    assert '"arguments": {"city": "Bern", "when": {"day": "Monday"}}' in found[0]
    assert '"arguments": {"numbers": [1, null, 3]}' in found[1] and '"properties": {"numbers": {"type": "array"}}' in found[1]
    assert '"arguments": {}' in found[2] and "<tools>" not in found[2] + found[3] and "null" not in found[3]


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_are_json_strings_stay_strings(chatty, tmp_path, kind):
    arguments = ('{"city": "Bern", "numbers": null}', '{"numbers": [1]}')
    rows = [{"chat": chat("f", text), "tools": [tool("f", city="string"), tool("g", numbers="array")]} for text in arguments]
    shards, origin = _write(kind, tmp_path / "d", [{**row, "chat": [*row["chat"], ROWS[3]["chat"][0]]} for row in rows])
    for text, found in zip(arguments, texts_of(chatty, shards, origin), strict=True):
        assert json.dumps(text) in found


@pytest.mark.parametrize("kind", ["jsonl", "parquet of json", "dataset of json", "stream of json"])
def test_a_null_that_json_has_is_kept(chatty, tmp_path, kind):
    """Where a null is known to have been given; of a struct of Arrow it is not."""
    rows = [{**ROWS[0], "chat": chat("weather", {"city": None, "when": 3})}, {**ROWS[1], "chat": chat("weather", {"days": [1]})}]
    shards, origin = _write(kind, tmp_path / "d", rows)
    first, second = texts_of(chatty, shards, origin)
    assert '"arguments": {"city": null, "when": 3}' in first and '"arguments": {"days": [1]}' in second


def test_a_null_in_a_column_of_its_own_is_still_seen_by_filters(chatty, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"chat": ROWS[3]["chat"], "tools": None, "score": score} for score in (1, None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    origin = Origin(**{**ORIGIN, "source": "parquet", "path": str(tmp_path), "filter": {"where": {"score": {"ge": 1}}}})
    made = make_render(chatty, origin)(Parquet(origin, columns_of(origin), skips=False).open(0).records(0))
    assert [rendered.left_out for rendered in made] == ["", "filtered"]


def test_maps_are_objects(chatty, tmp_path):
    """As other software than ours writes arguments that differ from row to row."""
    import pyarrow
    import pyarrow.parquet

    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct({"function": pyarrow.struct({"name": pyarrow.string(), "arguments": arguments})})
    turn = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.list_(call)})
    calls = [{"function": {"name": "f", "arguments": [("city", "Bern"), ("day", None)]}}]
    turns = [{"role": "user", "content": "f", "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": calls}]
    table = pyarrow.table({"chat": pyarrow.array([turns], pyarrow.list_(turn))})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    origin = Origin(source="parquet", path=str(tmp_path), messages="chat")
    (found,) = texts_of(chatty, Parquet(origin, columns_of(origin), skips=False), origin)
    assert '"arguments": {"city": "Bern", "day": null}' in found


def render(chatty, *rows, **changes):
    return make_render(chatty, Origin(**{**ORIGIN, **changes}))([Record(f"x.jsonl:{number}", row) for number, row in enumerate(rows, 1)])


def test_tools_may_be_json(chatty):
    for row in ROWS[:2]:
        made, as_text = render(chatty, row, {**row, "tools": json.dumps(row["tools"])})
        assert made.ids.tolist() == as_text.ids.tolist() and chatty.decode(made.ids) == expected(chatty, row)
    none = render(chatty, *({**ROWS[0], "tools": tools} for tools in (None, [], "", "[]", "null")))
    assert {chatty.decode(made.ids) for made in none} == {expected(chatty, {**ROWS[0], "tools": None})}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{broken", "has a text under data.tools 'tools' that is not JSON: "),
        ({"name": "f"}, "has no list of JSON schemas under data.tools 'tools': {'name': 'f'}"),
        (["f"], "has no list of JSON schemas under data.tools 'tools': ['f']"),
        (0, "has no list of JSON schemas under data.tools 'tools': 0"),
        ("3", "has no list of JSON schemas under data.tools 'tools': 3"),
    ],
)
def test_what_are_no_tools_is_bad(chatty, tools, message):
    (made,) = render(chatty, {**ROWS[0], "tools": tools})
    assert made.left_out == "bad" and message in made.problem


def test_a_row_must_have_the_column(chatty):
    (made,) = render(chatty, {"chat": ROWS[0]["chat"]})
    assert (
        made.left_out == "bad"
        and "has no 'tools', which data.tools names; it has: chat (a record without tools has null there)" in made.problem
    )


def counted_text(chatty, made):
    return chatty.decode([made.ids[place + 1] for place in range(len(made.ids) - 1) if made.counted[place]])


def test_options_reach_the_template(chatty):
    off, on, unset = (
        render(chatty, ROWS[0], template=template)[0] for template in ({"enable_thinking": False}, {"enable_thinking": True}, {})
    )
    assert chatty.decode(off.ids) == expected(chatty, ROWS[0], enable_thinking=False) != chatty.decode(on.ids)
    assert on.ids.tolist() == unset.ids.tolist()
    counted = {}
    for value in (False, True):
        (made,) = render(chatty, ROWS[0], template={"enable_thinking": value}, loss_on="completions")
        assert made.ids.tolist() == (on if value else off).ids.tolist()
        counted[value] = counted_text(chatty, made)
    # With its thinking switched off, a model is given the empty one.
    call = ROWS[0]["chat"][1]["tool_calls"]
    assert counted[False] == counted[True] == f"{json.dumps(call)}<|endoftext|>\nIt is done.<|endoftext|>\n"


def test_marked_templates_get_tools_and_options_too(chatty):
    marked = copy.deepcopy(chatty)
    said = "{{ m.content or '' }}{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|endoftext|>\n"
    assert said in TEMPLATE
    marked.chat_template = TEMPLATE.replace(
        said, f"{{% if m.role == 'assistant' %}}{{% generation %}}{said}{{% endgeneration %}}{{% else %}}{said}{{% endif %}}"
    )
    for options in ({}, {"enable_thinking": False}):
        settings = {"template": options, "loss_on": "completions"}
        (plain,), (made,) = render(chatty, ROWS[0], **settings), render(marked, ROWS[0], **settings)
        assert made.ids.tolist() == plain.ids.tolist() and counted_text(chatty, made) == counted_text(chatty, plain)


def test_prompts_are_written_with_tools_and_options(chatty):
    prompts = Prompts(**ORIGIN, template={"enable_thinking": False})
    made = prompt_render(chatty, prompts, 2000)([Record("x", ROWS[0]), Record("x", {**ROWS[1], "tools": "[0"})])
    row = {**ROWS[0], "chat": ROWS[0]["chat"][:3]}
    assert chatty.decode(made[0].ids) == expected(chatty, row, enable_thinking=False, add_generation_prompt=True)
    assert made[1].left_out == "bad" and "is not JSON" in made[1].problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"template": {"enable_thinkin": False}},
            r"data\.template\.enable_thinkin has no effect.*does not use.*did you mean 'enable_thinking'",
        ),
        ({"template": {"endoftext": 1}}, r"data\.template\.endoftext has no effect"),
        ({"template": {"add_generation_prompt": True}}, r"add_generation_prompt is no option of a chat template"),
        ({"template": {"tools": []}}, r"data\.template\.tools is no option"),
        ({"template": {"messages": []}}, r"data\.template\.messages is no option"),
    ],
)
def test_options_that_the_template_does_not_have_are_refused(chatty, changes, message):
    with pytest.raises(ValueError, match=message):
        render(chatty, ROWS[0], **changes)


def test_tools_that_the_template_does_not_write_are_refused(chatty):
    plain = copy.deepcopy(chatty)
    plain.chat_template = "{% for m in messages %}{{ m.content }} with tools {% endfor %}"
    with pytest.raises(ValueError, match=r"data\.tools has no effect: the chat template of .* does not use 'tools'"):
        render(plain, ROWS[0])
    # Of several templates, transformers takes the one that is for tools.
    plain.chat_template = {"default": plain.chat_template, "tool_use": TEMPLATE}
    assert chatty.decode(render(plain, ROWS[0])[0].ids) == expected(chatty, ROWS[0])


def test_without_messages_they_have_no_effect():
    for given in ({"tools": "tools"}, {"template": {"enable_thinking": False}}):
        name = next(iter(given))
        for rest in (
            {"source": "builtin"},
            {"source": "jsonl", "path": "x"},
            {"source": "jsonl", "path": "x", "prompt": "p", "completion": "c"},
        ):
            with pytest.raises(ValueError, match=rf"data\.{name} has no effect without data\.messages"):
                Data(**rest, **given, length=64)
        with pytest.raises(ValueError, match="has no effect"):
            Data(sources=[{"source": "builtin"}], length=64, **given)


def test_they_are_part_of_what_a_run_is(make_values, tiny_folder, chatty, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"source": "jsonl", "path": str(tmp_path / "x.jsonl"), "messages": "chat", "tools": "tools", "length": 64}
    (tmp_path / "r.yaml").write_text(json.dumps(make_values(tmp_path / "run", data=data)))
    plain = load_recipe(str(tmp_path / "r.yaml"), [], RetrofitRecipe)
    off = load_recipe(str(tmp_path / "r.yaml"), ["data.template.enable_thinking=false"], RetrofitRecipe)
    assert off.data.template == {"enable_thinking": False}
    assert differences(plain.model_dump(), off) == ["data.template.enable_thinking is None there and False here"]
    # A run that began before there was a choice is the run that makes none, alone and as one of several sources.
    several = plain.model_copy(update={"data": Data(sources=[{k: v for k, v in data.items() if k not in ("length", "tools")}], length=64)})
    for recipe, dumped in ((off, off.model_dump()["data"]), (several, several.model_dump()["data"])):
        before = recipe.model_dump()
        for section in [dumped, *(dumped["sources"] or [])]:
            section.pop("tools")
            section.pop("template")
        found = differences({**before, "data": dumped}, recipe)
        assert found == (
            []
            if recipe is several
            else ["data.tools is None there and 'tools' here", "data.template.enable_thinking is None there and False here"]
        )
    # As are the rows of a teacher's cache.
    assert len({cache_teacher.name_of(recipe, chatty) for recipe in (plain, off)}) == 2


def test_generated_rows_of_other_options_are_not_gone_on_with(tmp_path):
    def recipe(**changes):
        prompts = {**ORIGIN, **changes}
        return GenerateRecipe(model="x", output=str(tmp_path / "out.jsonl"), max_new_tokens=1, prompts=prompts, batch_size=1)

    with GeneratedFile(recipe(), "sources") as output:
        output.append([GeneratedRecord(0, "question", "answer", "questionanswer", "eos", 1, 1)])
    with GeneratedFile(recipe(), "sources"):
        pass
    with pytest.raises(ValueError, match=r"prompts\.template\.enable_thinking is None there and False here"):
        GeneratedFile(recipe(template={"enable_thinking": False}), "sources").__enter__()
    with pytest.raises(ValueError, match=r"prompts\.tools is 'tools' there and None here"):
        GeneratedFile(recipe(tools=None), "sources").__enter__()
