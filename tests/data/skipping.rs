//! Lines that cannot be read or learned, of which some may be left out.

use std::{fs, path::PathBuf};

use serde_json::Value;
use warpo::data::{self, Limits, ReadOptions, Records};

use crate::support::{
    golden,
    runs::{small, train_command, warpo},
    temp_dir,
};

fn put(test: &str, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = temp_dir(&format!("skipping_{test}")).join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn read(path: &std::path::Path, skip_bad: usize) -> Result<Records, String> {
    let options = ReadOptions { skip_bad, ..ReadOptions::default() };
    let folder = format!("{}/", path.parent().unwrap().display());
    data::read_as(path, &options).map_err(|e| e.to_string().replace(&folder, ""))
}

/// Each kind of file goes on behind a line that cannot be read; one more than allowed is an error.
#[test]
fn bad_lines_are_left_out_up_to_a_number() {
    let lines = b"{\"text\": \"a\"}\n{\"text\": 5}\nnonsense\n{\"text\": \"\xff\"}\n\
                  {\"prompt\": \"b\"}\n{\"text\": \"c\"}\n";
    for (name, bytes, bad, first) in [
        ("a.jsonl", &lines[..], 4, "a.jsonl:2: `text` is 5, wanted a text"),
        (
            "a.json",
            b"[{\"text\": \"a\"},\n 7, {\"text\": [\"]\"]},\n{\"text\": \"c\"}]",
            2,
            "a.json:2: wanted a JSON object, got 7",
        ),
        (
            "a.csv",
            b"text,n\na,1\nb\nx\xff,2\n\"q\"q,3\n\"c\",4\n",
            3,
            "a.csv:3: has 1 cells, wanted 2 as the header",
        ),
    ] {
        let path = put("kinds", name, bytes);
        let all = read(&path, bad).unwrap();
        let texts: Vec<&str> = all.iter().flat_map(|at| at.record.texts()).collect();
        assert_eq!(texts, ["a", "c"], "{name}");
        assert_eq!((all.bad.count, all.bad.left), (bad, 0), "{name}");
        let note = all.bad.note("read").unwrap().replace(path.to_str().unwrap(), name);
        assert_eq!(note, format!("{bad} lines left out that cannot be read; the first: {first}"));
        // The first that is one too many is the error that it always is.
        let plain = read(&path, 0).unwrap_err();
        assert_eq!(plain, first, "{name}");
        let e = read(&path, bad - 1).unwrap_err();
        assert!(e.starts_with(&format!("{name}:")) && e != plain, "{e}");
        assert_eq!(read(&path, 99).unwrap().bad.left, 99 - bad);
    }
    assert_eq!(
        read(&put("kinds", "good.jsonl", "{\"text\": \"a\"}"), 9).unwrap().bad.note(""),
        None
    );
}

/// What would take rows with it is no bad line: a list that is not JSON, a quote that does not end,
/// a file that ends early.
#[test]
fn a_file_that_is_broken_is_not_skipped() {
    for (name, text, want) in [
        ("a.json", "[{\"text\": \"a\"}\n{\"text\": \"b\"}]", "a.json:2: not JSON: expected `,`"),
        ("a.json", "[{\"text\": \"a\"}, {\"text\"},\n{\"text\": \"b\"}]", "a.json:1: not JSON: "),
        ("a.json", "[{\"text\": \"a\"},\n{\"text\": \"b", "a.json:2: not JSON: the list does not"),
        ("a.json", "[{\"text\": \"a\"},\n]", "a.json:2: not JSON: expected value at column 1"),
        ("a.csv", "text,n\na,1\n\"b,2\nc,3\n", "a.csv:3: has a quote that does not end"),
    ] {
        let e = read(&put("broken", name, text), 9).map(|all| all.rows).unwrap_err();
        assert!(e.starts_with(want), "{e}, wanted {want}");
    }
    let e = read(&put("broken", "all.jsonl", "5\n6\n"), 9).map(|all| all.rows).unwrap_err();
    assert!(e.starts_with("all.jsonl: has no records: 2 lines left out"), "{e}");
}

/// Lines that are read but of which no example can be made count, too.
#[test]
fn lines_of_which_no_example_can_be_made_count_too() {
    let text = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 700]}\n{\"input_ids\": [3, 4]}\n";
    let rows = data::read(&put("made", "a.jsonl", text)).unwrap();
    let made = |skip_bad| {
        let limits = Limits { max_length: 9, vocab: 10, eos: None, skip_bad };
        data::texts(&rows, None, limits, true)
    };
    let set = made(1).unwrap();
    let ids: Vec<&[u32]> = set.sequences.iter().map(AsRef::as_ref).collect();
    assert_eq!((ids, set.bad.count), (vec![&[1, 2][..], &[3, 4]], 1));
    assert!(
        set.bad
            .note("learned")
            .unwrap()
            .ends_with("a.jsonl:2: has token id 700, wanted less than 10")
    );
    assert!(
        made(0).unwrap_err().to_string().ends_with(":2: has token id 700, wanted less than 10")
    );
    let limits = Limits { max_length: 9, vocab: 10, eos: None, skip_bad: 1 };
    assert_eq!(data::scored(&rows, None, limits).unwrap().len(), 2);
    assert_eq!(data::prompts(&rows, None, limits, Some(9)).unwrap().len(), 2);
}

/// The commands that read data have it, say what they left out, and a run records it.
#[test]
fn every_command_that_reads_data_skips() {
    let dir = temp_dir("skipping_commands");
    let data = dir.join("bad.jsonl");
    let lines =
        "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [5, \"x\"]}\n{\"input_ids\": [8, 9]}\n";
    fs::write(&data, lines).unwrap();
    let model = golden::path("llama_tied");
    let (model, data) = (model.to_str().unwrap(), data.to_str().unwrap());
    let want = "1 line left out that cannot be read; the first: ";
    for command in ["tokenize", "score", "generate"] {
        let args = [command, "--model", model, "--data", data, "--skip-bad", "1"];
        let out = warpo(&args).output().unwrap();
        let error = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success() && error.contains(want), "{command}: {error}");
        let lines = String::from_utf8(out.stdout).unwrap().lines().count();
        assert_eq!(lines, 2, "{command}");
        let out = warpo(&args[..5]).output().unwrap();
        let error = String::from_utf8(out.stderr).unwrap();
        assert!(error.contains("bad.jsonl:2: `input_ids` has \"x\""), "{command}: {error}");
    }
    let run = dir.join("run");
    let mut pairs = small(&dir, "sft", &run);
    pairs.extend([format!("data={data}"), "steps=1".into()]);
    let out = train_command("sft", &pairs).output().unwrap();
    assert!(!out.status.success());
    pairs.push("skip_bad=1".into());
    let out = train_command("sft", &pairs).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let json = |path: PathBuf| -> Value {
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let about = json(run.join("run.json"));
    assert!(about["data"].as_str().unwrap().ends_with(", 1 bad lines left out"), "{about}");
    let state = json(run.join("checkpoints/step-1/state.json"));
    assert_eq!(state["run"]["settings"]["skip_bad"], "1", "{state}");
}
