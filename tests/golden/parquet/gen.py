"""Writes the Parquet files of this folder, and rows.json, which holds their rows as JSON.

    python3 -m venv venv && venv/bin/pip install pyarrow==26.0.1 && venv/bin/python gen.py
"""
import json

import pyarrow as pa
import pyarrow.parquet as pq

message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
chats = [
    {
        "messages": [
            {"role": "user", "content": f"Where is shelf {i}?", "name": None},
            {"role": "assistant", "content": f"By window {i}, \"zweiter\" Stock\n– 2️⃣.", "name": "desk"},
        ],
        "label": i % 2 == 0,
        "image": bytes([255, i]),
    }
    for i in range(7)
]
numbers = [
    {"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i], "when": i, "text": None}
    for i in range(5)
]
pairs = [
    {"prompt": f"p{i}", "chosen": "c" * i, "rejected": "r", "margin": i / 10, "big": 2**62}
    for i in range(5)
]
files = {
    "chats": (chats, [("messages", pa.list_(message)), ("label", pa.bool_()), ("image", pa.binary())]),
    "numbers": (
        numbers,
        [
            ("input_ids", pa.large_list(pa.uint32())),
            ("labels", pa.list_(pa.int64())),
            ("when", pa.timestamp("us")),
            ("text", pa.string()),
        ],
    ),
    "pairs": (
        pairs,
        [
            ("prompt", pa.dictionary(pa.int32(), pa.string())),
            ("chosen", pa.large_string()),
            ("rejected", pa.string()),
            ("margin", pa.float32()),
            ("big", pa.int64()),
        ],
    ),
}
for (name, (rows, schema)), packing in zip(files.items(), ["snappy", "zstd", "none"]):
    table = pa.Table.from_pylist(rows, schema=pa.schema(schema))
    pq.write_table(table, f"{name}.parquet", compression=packing, row_group_size=3)
dates = pa.table({"text": pa.array([0, 1], pa.date32())})
pq.write_table(dates, "dates.parquet")
drop = {"image", "when", "big"}
known = {n: [{k: v for k, v in r.items() if k not in drop} for r in rows] for n, (rows, _) in files.items()}
with open("rows.json", "w") as out:
    json.dump(known, out, ensure_ascii=False, indent=1)
    out.write("\n")
