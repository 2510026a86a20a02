//! Kinds of files, packed or not; folders and patterns.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use warpo::data::{self, Record};

use crate::support::temp_dir;

const LINES: &str = "{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n";

/// Line and text of each record, or the error without the folder.
fn read(path: &Path) -> Result<Vec<(usize, String)>, String> {
    let all = data::read(path).map_err(|e| {
        let folder = format!("{}/", path.parent().unwrap().display());
        e.to_string().replace(&folder, "")
    })?;
    let text = |record| match record {
        Record::Text { text } => text,
        Record::Completion { prompt, completion } => format!("{prompt}|{completion}"),
        other => format!("{other:?}"),
    };
    Ok(all.into_iter().map(|at| (at.place.line, text(at.record))).collect())
}

fn put(test: &str, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = temp_dir(&format!("files_{test}")).join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

/// A row at each of these lines.
fn rows(all: &[(usize, &str)]) -> Result<Vec<(usize, String)>, String> {
    Ok(all.iter().map(|(line, text)| (*line, (*text).to_owned())).collect())
}

#[test]
fn packed_files_are_told_by_their_first_bytes() {
    let want = rows(&[(1, "a"), (3, "b")]);
    for (name, bytes) in [
        ("plain.jsonl", LINES.into()),
        ("a.jsonl.gz", gzip(LINES.as_bytes())),
        ("a.jsonl.zst", zstd(LINES.as_bytes())),
        ("no_suffix", zstd(LINES.as_bytes())),
        // parts behind each other
        ("two.gz", [gzip(&LINES.as_bytes()[..10]), gzip(&LINES.as_bytes()[10..])].concat()),
        ("two.zst", [zstd(&LINES.as_bytes()[..10]), zstd(&LINES.as_bytes()[10..])].concat()),
    ] {
        assert_eq!(read(&put("packed", name, bytes)), want, "{name}");
    }
    let table = "prompt,completion\np,c\n";
    let path = put("packed", "a.csv.gz", gzip(table.as_bytes()));
    assert_eq!(read(&path), rows(&[(2, "p|c")]));
    // a bit that changed, and a file that was cut off
    let mut bad = gzip(LINES.as_bytes());
    let at = bad.len() - 6;
    bad[at] ^= 1;
    for bytes in [bad, gzip(LINES.as_bytes())[..20].to_vec(), zstd(LINES.as_bytes())[..12].to_vec()]
    {
        let e = read(&put("packed", "bad.gz", bytes)).unwrap_err();
        assert!(e.starts_with("cannot read bad.gz: "), "{e}");
    }
}

#[test]
fn a_json_list_is_a_row_an_object() {
    let list = "\u{feff}[\n  {\"text\": \"a\"},\n  {\n    \"text\": \"b\"\n  }\n]\n";
    assert_eq!(read(&put("list", "a.json", list)), rows(&[(2, "a"), (3, "b")]));
    assert_eq!(read(&put("list", "a.json", "[{\"text\": \"a\"}]")), rows(&[(1, "a")]));
    for (text, want) in [
        ("[]", "a.json: has no records, wanted JSON objects, one a line"),
        ("[\n{\"text\": 5}]", "a.json:2: `text` is 5, wanted a text"),
        ("[\n{\"text\": \"a\"},\n 7]", "a.json:3: wanted a JSON object, got 7"),
        ("[{\"text\": \"a\"}\n{}]", "a.json:2: not JSON: expected `,` or `]` at column 1"),
        ("[{\"text\": \"a\"}]\n{}", "a.json:2: not JSON: trailing characters at column 1"),
    ] {
        assert_eq!(read(&put("list", "a.json", text)), Err(want.into()), "{text}");
    }
}

/// A list is read an element at a time, whatever stands in its texts and however long its lines.
#[test]
fn a_list_is_taken_apart_as_its_texts_say() {
    let odd = "]},{\\\"[\\\\";
    let element = |text: &str| format!("{{\"text\": \"{text}\", \"n\": [1, {{}}, []]}}");
    let want = rows(&[(3, "]},{\"[\\"), (4, "b")]);
    let list = format!("\n\n[ {} \n,{}]", element(odd), element("b"));
    assert_eq!(read(&put("apart", "a.json", list)), want);
    // Longer in one line than a row may be, of which nothing is kept.
    let long = format!("[{}]", vec![element(&"x".repeat(1 << 20)); 80].join(","));
    assert_eq!(read(&put("apart", "a.json", long)).unwrap().len(), 80);
    let e = read(&put("apart", "a.json", "[1, true]")).unwrap_err();
    assert_eq!(e, "a.json:1: wanted a JSON object, got 1");
    let e = read(&put("apart", "a.json", "[{\"text\": \"a\"}}]")).unwrap_err();
    assert_eq!(e, "a.json:1: not JSON: expected `,` or `]` at column 15");
}

/// A small file that would fill the memory is refused by name.
#[test]
fn what_unpacks_to_far_more_than_text_is_refused() {
    let line = format!("{{\"text\": \"{}\"}}\n", "a".repeat(1 << 20));
    let bomb = line.repeat(100);
    for (name, bytes) in
        [("a.jsonl.gz", gzip(bomb.as_bytes())), ("a.jsonl.zst", zstd(bomb.as_bytes()))]
    {
        assert!(bytes.len() < 1 << 18, "{}", bytes.len());
        let e = read(&put("bomb", name, bytes)).unwrap_err();
        let want =
            format!("cannot read {name}: it unpacks to more than 64 MiB and 100 times its size");
        assert!(e.starts_with(&want), "{e}");
    }
    // as many as that are no bomb
    let few = line.repeat(50);
    assert_eq!(read(&put("bomb", "a.jsonl.gz", gzip(few.as_bytes()))).unwrap().len(), 50);
}

/// Frames that hold no content are skipped wherever they stand (RFC 8878, 3.1.2).
#[test]
fn skippable_frames_of_zstd_are_skipped() {
    let skip = |magic: u8, n: u32| {
        let head = [[magic, 0x2a, 0x4d, 0x18], n.to_le_bytes()].concat();
        [head, vec![b'x'; n as usize]].concat()
    };
    let part = |range: std::ops::Range<usize>| zstd(&LINES.as_bytes()[range]);
    let n = LINES.len();
    let frames =
        [skip(0x50, 0), part(0..9), skip(0x5f, 70_000), part(9..n), skip(0x55, 3)].concat();
    assert_eq!(read(&put("skippable", "a.jsonl.zst", frames)), rows(&[(1, "a"), (3, "b")]));
    let cut = [part(0..n), skip(0x50, 9)[..12].to_vec()].concat();
    let e = read(&put("skippable", "a.jsonl.zst", cut)).unwrap_err();
    assert_eq!(e, "cannot read a.jsonl.zst: it ends within a skippable frame");
}

/// The content of a zstd frame is held to its checksum: one bit of a text changes nothing else.
#[test]
fn a_flipped_bit_in_a_zstd_file_is_noticed() {
    let mut bytes = zstd(LINES.as_bytes());
    let at = bytes.windows(3).position(|w| w == b"\"a\"").unwrap() + 1;
    bytes[at] ^= 1;
    let e = read(&put("checksum", "a.jsonl.zst", bytes)).unwrap_err();
    assert_eq!(e, "cannot read a.jsonl.zst: its content has another checksum");
}

#[test]
fn tables_have_a_header_and_quotes() {
    let table = "\u{feff}prompt,id,completion\r\n\"a, \"\"b\"\"\",1,\"c\r\nd\"\r\n\r\ne,2,\r\n";
    let want = rows(&[(2, "a, \"b\"|c\r\nd"), (5, "e|")]);
    assert_eq!(read(&put("table", "a.csv", table)), want);
    assert_eq!(read(&put("table", "a.tsv", "text\tid\na, b\t1")), rows(&[(2, "a, b")]));
    // A quote within a cell that does not begin with one is text, and nothing goes on.
    let inches = "text\n5\" disk\n6\" disk\n";
    assert_eq!(read(&put("table", "a.tsv", inches)), rows(&[(2, "5\" disk"), (3, "6\" disk")]));
    let inches = "\u{feff}\"text\",\"of\"\n5\" disk,\"a\n\"\"\nb\"\n\"\",c\n";
    assert_eq!(read(&put("table", "a.csv", inches)), rows(&[(2, "5\" disk"), (5, "")]));
    // columns that are lists or numbers
    let lists = "input_ids,labels\n\"[5, 6]\",\"[-100, 6]\"\n";
    let records = data::read(&put("table", "a.csv", lists)).unwrap();
    let want = Record::LabelledIds { input_ids: vec![5, 6], learn: vec![false, true] };
    assert_eq!(records[0].record, want);
    let pairs = "prompt,chosen,rejected,margin\np,c,r,0.5\np,c,1,\n";
    let records = data::read(&put("table", "a.csv", pairs)).unwrap();
    let margin = |i: usize| match &records[i].record {
        Record::Preference { rejected, margin, .. } => (rejected.clone(), *margin),
        other => panic!("{other:?}"),
    };
    assert_eq!([margin(0), margin(1)], [("r".into(), Some(0.5)), ("1".into(), None)]);
    // messages are JSON; a text that looks like them is a text
    let chats = "chosen,rejected\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"a\"\"}]\",\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"b\"\"}]\"\n";
    let records = data::read(&put("table", "a.csv", chats)).unwrap();
    assert!(matches!(&records[0].record, Record::ChatPreference { .. }), "{records:?}");
    let call = "prompt,completion\na,\"[{\"\"name\"\": 1}]\"\n";
    assert_eq!(read(&put("table", "a.csv", call)), rows(&[(2, "a|[{\"name\": 1}]")]));
    for (text, want) in [
        (
            "chosen,rejected\n\"[{'role': 'user'}]\",b",
            "a.csv:2: `chosen` has messages as Python prints them, wanted JSON",
        ),
        ("", "a.csv: is empty, wanted a line that names the columns"),
        ("text\n", "a.csv: has no records, wanted JSON objects, one a line"),
        ("text,text\na,b", "a.csv:1: has column \"text\" twice"),
        ("text,id\na,1\nb", "a.csv:3: has 1 cells, wanted 2 as the header"),
        ("text,id\na,1\n\"b\nc,1", "a.csv:3: has a quote that does not end"),
        ("text,id\n\"b\" c,1", "a.csv:2: has text behind the quotes of cell 1"),
        (
            "txt\na",
            "a.csv:2: has columns [\"txt\"], wanted messages | conversations | text | text, label",
        ),
    ] {
        let e = read(&put("table", "a.csv", text)).unwrap_err();
        assert!(e.starts_with(want), "{e}, wanted {want}");
    }
    fs::write(put("table", "b.csv", ""), b"text\nab\xff\n").unwrap();
    let e = read(&put("table", "c.csv", b"text\nab\xff\n")).unwrap_err();
    assert_eq!(e, "c.csv:2: not UTF-8 at byte 3");
}

#[test]
fn a_folder_and_a_pattern_are_their_files_by_name() {
    let dir = temp_dir("files_folder");
    let line = |text: &str| format!("{{\"text\": {text:?}}}\n");
    for (name, bytes) in [
        ("b-2.jsonl", line("b2").into_bytes()),
        ("b-1.json", format!("[{}]", line("b1")).into_bytes()),
        ("a.jsonl.gz", gzip(line("a").as_bytes())),
        ("README.md", b"no data".into()),
        (".hidden.jsonl", b"no data".into()),
    ] {
        fs::write(dir.join(name), bytes).unwrap();
    }
    fs::create_dir(dir.join("deeper.jsonl")).unwrap();
    let texts = |path: &Path| -> Vec<String> {
        read(path).unwrap().into_iter().map(|(_, text)| text).collect()
    };
    assert_eq!(texts(&dir), ["a", "b1", "b2"]);
    assert_eq!(texts(&dir.join("b-?.json*")), ["b1", "b2"]);
    assert_eq!(texts(&dir.join("*2*")), ["b2"]);
    assert_eq!(read(&dir.join("c*.jsonl")), Err("c*.jsonl: matches no file".into()));
    // a file whose name is a pattern is that file
    fs::write(dir.join("b*"), line("star")).unwrap();
    assert_eq!(texts(&dir.join("b*")), ["star"]);
    // a link to nothing, as a hub's cache that was fetched in part has
    std::os::unix::fs::symlink("gone", dir.join("c.jsonl")).unwrap();
    let e = read(&dir).unwrap_err();
    assert!(e.contains("c.jsonl: No such file"), "{e}");
    let empty = temp_dir("files_empty");
    let e = data::read(&empty).unwrap_err().to_string();
    assert!(e.contains("has no data file, wanted .jsonl, .ndjson, .json, .csv, .tsv"), "{e}");
}
