//! The rows of `generate` and `score`: in a file, gone on with, summed up, ended by a text.

use serde_json::Value;

use super::{feed, floats, lines, model, refused};
use crate::support::temp_dir;

const PROMPTS: &str = "{\"prompt\": \"Once upon\"}\n{\"prompt\": \"Lily and Tom\"}\n";

/// A file that was cut off anywhere ends with the bytes of the straight run, and is told from one
/// of other settings.
#[test]
fn a_file_of_rows_is_gone_on_with() {
    let (dir, m) = (temp_dir("cli_rows"), model());
    let path = dir.join("rows.jsonl");
    let path = path.to_str().unwrap();
    let generate = |more: &[&str]| {
        let args = ["generate", "--model", &m, "--samples", "3", "--max-new-tokens", "5"];
        feed(&[&args[..], &["--out", path], more].concat(), PROMPTS)
    };
    let done = generate(&[]);
    assert!(done.status.success() && done.stdout.is_empty());
    let whole = std::fs::read(path).unwrap();
    let ends: Vec<usize> = (0..whole.len()).filter(|i| whole[*i] == b'\n').map(|i| i + 1).collect();
    assert_eq!(ends.len(), 6);
    for cut in [0, 10, ends[0], ends[2], ends[2] + 7, ends[5] - 1, ends[5]] {
        std::fs::write(path, &whole[..cut]).unwrap();
        let done = generate(&["--resume"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(std::fs::read(path).unwrap() == whole, "cut at {cut}");
    }
    std::fs::write(path, &whole[..ends[3]]).unwrap();
    let (code, e) = refused(&generate(&["--resume", "--seed", "1"]));
    assert!(code == 1 && e.contains("rows.jsonl: row 4 is another than this command makes"), "{e}");
    assert!(std::fs::read(path).unwrap() == whole[..ends[3]], "nothing was added");
    let (code, e) = refused(&generate(&[]));
    assert!(code == 2 && e.contains("`--out`"), "{e}");
    let (code, e) = refused(&feed(&["generate", "--model", &m, "--resume"], PROMPTS));
    assert!(code == 2 && e.contains("--out <FILE>"), "{e}");
}

/// The summary is that of the rows, whether they were written at once or not.
#[test]
fn scores_are_summed_up() {
    let (dir, m) = (temp_dir("cli_summary"), model());
    let path = dir.join("rows.jsonl");
    let mut input = String::new();
    for (chosen, rejected) in [(" a time", " a cat"), (" xq", " a time"), (" a dog", " a dog")] {
        let row =
            serde_json::json!({ "prompt": "Once upon", "chosen": chosen, "rejected": rejected });
        input += &format!("{row}\n");
    }
    let args = ["score", "--model", &m, "--summary", "--out", path.to_str().unwrap()];
    let first = lines(&feed(&args, &input));
    let text = std::fs::read_to_string(&path).unwrap();
    let rows: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |row: &Value, side: &str| {
        (row[side]["sum_logprob"].as_f64().unwrap(), floats(&row[side]["logprobs"]).len() as f64)
    };
    let (mut sum, mut n, mut margin) = (0.0, 0.0, 0.0);
    for row in &rows {
        let (chosen, rejected) = (of(row, "chosen"), of(row, "rejected"));
        (sum, n) = (sum + chosen.0 + rejected.0, n + chosen.1 + rejected.1);
        margin += (chosen.0 - rejected.0) / 3.0;
    }
    let get = |key: &str| first[0][key].as_f64().unwrap();
    assert_eq!((get("rows"), get("tokens"), get("logprob_accuracy")), (3.0, n, 0.5));
    assert!((get("perplexity") / (-sum / n).exp() - 1.0).abs() < 1e-12);
    assert!((get("logprob_margin") / margin - 1.0).abs() < 1e-12);
    assert!(first[0].get("reward_mean").is_none(), "no reward model was asked for");
    // from the second row on, and to standard error
    let end = text.find('\n').unwrap() + 1;
    std::fs::write(&path, &text[..end + 9]).unwrap();
    assert_eq!(lines(&feed(&[&args[..], &["--resume"]].concat(), &input)), first);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    let out = feed(&["score", "--model", &m, "--summary"], &input);
    assert_eq!(lines(&out), rows);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(serde_json::from_str::<Value>(said.trim()).unwrap(), first[0]);
}

/// A sample ends before the text, and its tokens with that which completes it.
#[test]
fn a_text_ends_a_sample() {
    let m = model();
    let args = ["generate", "--model", &m, "--temperature", "0", "--max-new-tokens"];
    let most = |n: usize, more: &[&str]| {
        let n = n.to_string();
        lines(&feed(&[&args[..], &[&n], more].concat(), PROMPTS))
    };
    let generate = |more: &[&str]| most(40, more);
    let whole = generate(&[]);
    let text = |row: &Value| row["text"].as_str().unwrap().to_owned();
    let stop: String = text(&whole[0]).chars().skip(9).take(4).collect();
    let cut = generate(&["--stop", "nowhere", "--stop", &stop]);
    let at = text(&whole[0]).find(&stop).unwrap();
    assert_eq!(text(&cut[0]), text(&whole[0])[..at]);
    assert_eq!(cut[0]["stopped"], true);
    let n = floats(&cut[0]["logprobs"]).len();
    assert!(n < 40 && cut[0]["output_ids"].as_array().unwrap().len() == n);
    assert_eq!(floats(&cut[0]["logprobs"]), floats(&whole[0]["logprobs"])[..n]);
    // one token fewer does not hold it
    let ids = &whole[0]["output_ids"].as_array().unwrap()[..n];
    assert_eq!(cut[0]["output_ids"].as_array().unwrap(), ids);
    for (n, holds) in [(n, true), (n - 1, false)] {
        assert_eq!(text(&most(n, &[])[0]).contains(&stop), holds);
    }
    let (code, e) = refused(&feed(&[&args[..], &["5", "--stop", ""]].concat(), PROMPTS));
    assert!(code == 2 && e.contains("`--stop`: got an empty one, wanted a text"), "{e}");
    let ids = crate::support::golden::path("llama_tied").display().to_string();
    let args = ["generate", "--model", &ids, "--stop", "x"];
    let (code, e) = refused(&feed(&args, "{\"input_ids\": [5]}\n"));
    assert!(code == 2 && e.contains("wanted a tokenizer in"), "{e}");
}
