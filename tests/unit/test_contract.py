import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sglang.contract import (
    KEY,
    ContractError,
    RequestContract,
    ResponseInfo,
    Together,
    VerifyContract,
    contract_of,
)

labels = st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True)
contracts = st.builds(
    RequestContract,
    group=st.text(min_size=1),
    branch=st.none() | st.integers(0, 1000),
    depth=st.none() | st.integers(0, 10),
    share=st.sampled_from([None, "exact", "similar"]),
    tau=st.none() | st.floats(0, 1),
    together=st.none() | st.builds(Together, id=st.text(min_size=1), count=st.integers(1, 1000)),
    verify=st.none()
    | st.builds(
        VerifyContract,
        labels=labels.map(tuple),
        exit=st.sampled_from(["off", "layer", "paper"]),
        profile=st.none() | st.text(),
    ),
)


@given(contracts)
def test_what_the_frontend_writes_the_server_reads(contract):
    assert RequestContract.parse(contract.to_dict()) == contract


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"grup": "g"}, "rksc.grup"),
        ({"verify": {"labels": ["a", "b"], "exits": 1}}, "rksc.verify.exits"),
        ([], "rksc"),
        ("exact", "rksc"),
        ({"group": ""}, "rksc.group"),
        ({"group": 3}, "rksc.group"),
        ({"group": "g", "branch": -1}, "rksc.branch"),
        ({"group": "g", "branch": True}, "rksc.branch"),
        ({"branch": 1}, "rksc.branch"),
        ({"depth": 1.5}, "rksc.depth"),
        ({"share": "some"}, "rksc.share"),
        ({"tau": 1.01}, "rksc.tau"),
        ({"tau": "0.8"}, "rksc.tau"),
        ({"tau": float("nan")}, "rksc.tau"),
        ({"together": 3}, "rksc.together"),
        ({"together": {"id": "", "count": 2}}, "rksc.together.id"),
        ({"together": {"id": "a", "count": 0}}, "rksc.together.count"),
        ({"together": {"id": "a", "count": True}}, "rksc.together.count"),
        ({"together": {"id": "a", "count": 2, "of": 3}}, "rksc.together.of"),
        ({"verify": True}, "rksc.verify"),
        ({"verify": {}}, "rksc.verify.labels"),
        ({"verify": {"labels": ["YES"]}}, "rksc.verify.labels"),
        ({"verify": {"labels": ["YES", "YES"]}}, "rksc.verify.labels"),
        ({"verify": {"labels": "YES"}}, "rksc.verify.labels"),
        ({"verify": {"labels": ["a", "b"], "exit": "soon"}}, "rksc.verify.exit"),
        ({"verify": {"labels": ["a", "b"], "profile": 1}}, "rksc.verify.profile"),
    ],
)
def test_a_malformed_contract_is_refused_naming_the_key(raw, named):
    with pytest.raises(ContractError, match=f"custom_params.{named}: "):
        RequestContract.parse(raw)


def test_null_means_not_given():
    assert RequestContract.parse({"group": None, "tau": None}) == RequestContract()


@pytest.mark.parametrize("params", [None, {}, {"custom_params": None}, {"custom_params": {"x": 1}}])
def test_requests_without_the_contract_have_none(params):
    assert contract_of(params) is None


def test_the_contract_is_found_beside_other_custom_params():
    params = {"custom_params": {"thinking_budget": 3, KEY: {"group": "g"}}}
    assert contract_of(params) == RequestContract(group="g")


def test_the_response_has_every_key():
    assert set(ResponseInfo().to_dict()) == {
        "share",
        "exact_tokens",
        "spliced_tokens",
        "recomputed_tokens",
        "similarity",
        "exit_layer",
        "num_layers",
        "merged_into",
        "fallback",
    }
    found = ResponseInfo(label_scores=[1.0, 2.0], states=[[0.0, 1.0]]).to_dict()
    assert (found["label_scores"], found["states"]) == ([1.0, 2.0], [[0.0, 1.0]])
