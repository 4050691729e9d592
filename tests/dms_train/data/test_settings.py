import pytest
from dms_train.data.settings import Data, Source
from dms_train.recipe_file import dump_recipe, parse_yaml

JSONL = {"source": "jsonl", "path": "x.jsonl", "length": 64}


def test_a_resolved_section_can_be_read_again():
    for data in (
        Data(source="builtin", length=64, items=[1, 2]),
        Data(length=64, sources=[{"source": "jsonl", "path": "x", "weight": [[0, 1], [9, 0.5]]}, {"source": "builtin", "weight": 2}]),
        Data(**JSONL, filter={"min_chars": 3, "where": {"lang": {"one_of": ["en", "de"]}, "score": {"ge": 0.5}}}),
    ):
        assert Data(**parse_yaml(dump_recipe(data), "dumped")) == data


def test_a_weight_schedule_is_linear_between_its_points():
    source = Source(source="builtin", weight=[[10, 1.0], [20, 3.0], [30, 0.0]])
    assert [source.weight_at(step) for step in (1, 10, 15, 20, 25, 30, 99)] == [1.0, 1.0, 2.0, 3.0, 1.5, 0.0, 0.0]
    assert Source(source="builtin", weight=2).weight_at(7) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 64}, "give source, or several under sources"),
        ({**JSONL, "sources": [{"source": "builtin"}]}, "both given"),
        ({"length": 64, "sources": [{"source": "builtin"}], "path": "x"}, "data.path has no effect beside data.sources"),
        ({"source": "builtin", "length": 64, "path": "x"}, "data.path has no effect with source: builtin"),
        ({"source": "builtin", "length": 64, "loss_on": "completions"}, "data.loss_on has no effect with source: builtin"),
        ({"source": "builtin", "length": 64, "filter": {"min_chars": 1}}, "data.filter has no effect"),
        ({"source": "parquet", "length": 64}, "needs a file, folder or glob"),
        ({**JSONL, "streaming": True}, "data.streaming has no effect with source: jsonl"),
        ({**JSONL, "items": [1, 2]}, "data.items has no effect"),
        ({**JSONL, "field": "body", "messages": "chat"}, "data.field has no effect beside"),
        ({**JSONL, "prompt": "p"}, "data.completion is missing"),
        ({**JSONL, "loss_on": "completions"}, "needs messages, or prompt and completion"),
        ({**JSONL, "source": "text", "filter": {"where": {"a": {"eq": 1}}}}, "no columns"),
        ({**JSONL, "filter": {"min_chars": 9, "max_chars": 3}}, "no document would pass"),
        ({**JSONL, "filter": {"matches": "("}}, "not a regular expression"),
        ({**JSONL, "filter": {"where": {"a": {}}}}, "a condition is empty"),
        ({**JSONL, "filter": {"where": {"a": {"equal": 1}}}}, "unknown key 'equal'"),
        ({"length": 64, "sources": [{"source": "builtin", "weight": -1}]}, "0 or above"),
        ({"length": 64, "sources": [{"source": "builtin", "weight": [[5, 1], [5, 2]]}]}, "steps are whole numbers that rise"),
        ({"length": 64, "sources": [{"source": "builtin", "weight": [[1, 1], [5, 0]]}]}, "all weights are 0 at step 5"),
    ],
)
def test_what_is_missing_or_without_effect_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Data(**values)


def test_documents_are_cut_to_fill_rows_unless_that_would_part_what_belongs_together():
    assert Data(**JSONL).cuts and not Data(**JSONL, fill="pad").cuts
    assert not Data(**JSONL, long_documents="drop").cuts and Data(**JSONL, long_documents="drop", fill="cut").cuts
    assert not Data(**JSONL, prompt="p", completion="c", loss_on="completions").cuts
