//! Parquet: the rows are those that JSON lines would have, and a damaged file is an error.

use std::{fs, path::PathBuf};

use warpo::data;

use crate::support::{golden, temp_dir};

fn path(name: &str) -> PathBuf {
    golden::path("parquet").join(name)
}

/// A build without it says how to get one that has it.
#[cfg(not(feature = "parquet"))]
#[test]
fn a_build_without_parquet_says_how_to_get_it() {
    let e = data::read(&path("chats.parquet")).unwrap_err().to_string();
    assert!(e.contains("chats.parquet: is Parquet, which this build does not read"), "{e}");
    assert!(e.contains("--features parquet"), "{e}");
}

#[test]
fn what_is_no_parquet_is_said() {
    let dir = temp_dir("parquet_none");
    for (text, want) in [
        ("", "bad.parquet: is no Parquet file, wanted PAR1 at its beginning"),
        ("{}", "bad.parquet: is no Parquet file, wanted PAR1 at its beginning"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "bad.parquet: is a pointer of Git LFS, not the file: `git lfs pull` gets it",
        ),
    ] {
        fs::write(dir.join("bad.parquet"), text).unwrap();
        let e = data::read(&dir.join("bad.parquet")).unwrap_err().to_string();
        assert!(e.ends_with(want), "{e}");
    }
}

#[cfg(feature = "parquet")]
mod built_in {
    use serde_json::Value;

    use super::*;
    use warpo::data::ReadOptions;

    /// The rows of pyarrow, once as Parquet and once as JSON lines, are the same records.
    #[test]
    fn parquet_has_the_rows_that_json_has() {
        let dir = temp_dir("parquet_rows");
        let text = fs::read_to_string(path("rows.json")).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        for (name, rows) in all.as_object().unwrap() {
            let rows = rows.as_array().unwrap();
            let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
            let json = dir.join(format!("{name}.jsonl"));
            fs::write(&json, lines).unwrap();
            let want = data::read(&json).unwrap();
            let got = data::read(&path(&format!("{name}.parquet"))).unwrap();
            assert_eq!(want.len(), rows.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!((got.place.line, &got.record), (i + 1, &want.record), "{name}");
            }
            assert_eq!(got.len(), want.len(), "{name}");
        }
    }

    #[test]
    fn columns_of_parquet_are_named_and_renamed() {
        let columns = [("text".to_owned(), "chosen".to_owned())].into();
        let options = ReadOptions { columns, ..ReadOptions::default() };
        let e = data::read_as(&path("pairs.parquet"), &options).unwrap_err().to_string();
        assert!(e.contains("has `rejected` without `chosen`"), "{e}");
        let e = data::read(&path("dates.parquet")).unwrap_err().to_string();
        let want = "dates.parquet:1: column \"text\": has a date, a time or a decimal, wanted text";
        assert!(e.contains(want), "{e}");
    }

    /// No byte that changes, and no cut, is more than an error that names the file.
    #[test]
    fn hostile_parquet_is_an_error_of_its_file() {
        let dir = temp_dir("parquet_hostile");
        let bad = dir.join("bad.parquet");
        let mut refused = 0;
        for name in ["chats.parquet", "numbers.parquet", "pairs.parquet"] {
            let whole = fs::read(path(name)).unwrap();
            let cuts = (0..whole.len()).step_by(7).map(|at| whole[..at].to_vec());
            let flips = (0..whole.len()).map(|at| (at, [1u8, 0x80, 0xff][at % 3]));
            let flipped = flips.map(|(at, x)| {
                let mut bytes = whole.clone();
                bytes[at] ^= x;
                bytes
            });
            for bytes in cuts.chain(flipped) {
                fs::write(&bad, bytes).unwrap();
                if let Err(e) = data::read(&bad) {
                    let e = e.to_string();
                    assert!(e.contains("bad.parquet"), "{e}");
                    refused += 1;
                }
            }
        }
        assert!(refused > 1000, "{refused}");
    }
}
