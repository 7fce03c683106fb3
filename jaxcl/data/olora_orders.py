"""The orders of the O-LoRA benchmark's tasks: facts only, so that listing them reads no data."""

from __future__ import annotations

_ORDERS = {
    "order_1": "dbpedia amazon yahoo agnews",
    "order_2": "dbpedia amazon agnews yahoo",
    "order_3": "yahoo amazon agnews dbpedia",
    "order_4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "order_5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "order_6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
ORDERS: dict[str, tuple[str, ...]] = {f"olora/{name}": tuple(tasks.split()) for name, tasks in _ORDERS.items()}
"""{stream: its tasks in order}; the first three have four tasks, the others fifteen."""
