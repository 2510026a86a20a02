//! Chat templates render as `transformers` renders them, and hostile ones are errors.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;
use warpo::data::{
    BUILT_IN,
    jinja::{Rendering, Template, Variable, noon},
};

use crate::support::{golden, memory, root};

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The conversations of a golden set, as `transformers` hands them on.
struct Conversations(Value);

impl Conversations {
    fn read(path: &Path) -> Self {
        let mut all = json(path);
        for messages in all["conversations"].as_object_mut().unwrap().values_mut() {
            for m in messages.as_array_mut().unwrap() {
                let m = m.as_object_mut().unwrap();
                m.retain(|_, v| !v.is_null());
                if let Some(thought) = m.get("reasoning_content").cloned() {
                    m.insert("thinking".into(), thought);
                }
            }
        }
        Self(all)
    }

    /// Renders one of them; `flags` are those of a row of the golden set.
    fn render(
        &self,
        template: &Template,
        name: &str,
        flags: &Value,
        now: i64,
    ) -> Result<Rendering, String> {
        let (messages, null) = (&self.0["conversations"][name], Value::Null);
        if messages.as_array().unwrap().is_empty() {
            return Err("empty".into());
        }
        let tokens = self.0["special_tokens"].as_object().unwrap();
        let tokens = tokens.iter().map(|(k, v)| (&**k, Variable::Written(v.as_str().unwrap())));
        let more = flags["kw"].as_object().into_iter().flatten();
        let mut all: Vec<_> = tokens.chain(more.map(|(k, v)| (&**k, Variable::Given(v)))).collect();
        let open = flags["cont"] == true;
        let tools = flags["tools"] == true;
        all.extend([
            (
                "messages",
                if open { Variable::Unfinished(messages) } else { Variable::Given(messages) },
            ),
            ("tools", Variable::Given(if tools { &self.0["tools"] } else { &null })),
            ("documents", Variable::Given(&null)),
            (
                "add_generation_prompt",
                Variable::Bool(flags["agp"] == true || flags["prompt"] == true),
            ),
        ]);
        template.render(&all, now)
    }
}

/// Spans in characters, as the golden sets have them: within the text, neighbours as one.
fn spans(text: &str, all: &Value) -> Vec<(usize, usize)> {
    let end = text.chars().count();
    let mut out: Vec<(usize, usize)> = Vec::new();
    for span in all.as_array().unwrap() {
        let at = |i: usize| (span[i].as_u64().unwrap() as usize).min(end);
        match out.last_mut() {
            _ if at(0) >= at(1) => {}
            Some(last) if last.1 == at(0) => last.1 = at(1),
            _ => out.push((at(0), at(1))),
        }
    }
    out
}

/// The bytes that `generation` blocks wrote, in characters.
fn generated(of: &Rendering) -> Vec<(usize, usize)> {
    let chars = |bytes: usize| of.text[..bytes].chars().count();
    of.generated.iter().map(|r| (chars(r.start), chars(r.end))).collect()
}

#[test]
fn built_in_templates_render_as_jinja2_renders_them() {
    let dir = golden::path("chat");
    let all = Conversations::read(&dir.join("conversations.json"));
    let (mut rendered, mut raised) = (0, 0);
    for row in lines(&dir.join("builtin.jsonl")) {
        let name = row["template"].as_str().unwrap();
        let (_, source) = BUILT_IN.iter().find(|(n, _)| *n == name).unwrap();
        let template = Template::parse(source).unwrap();
        assert!(template.generates());
        let conversation = row["conversation"].as_str().unwrap();
        let got = all.render(&template, conversation, &row, 0);
        let what = format!("{name} {conversation} {row}");
        match (got, row["out"].as_str()) {
            (Ok(got), Some(want)) => {
                assert_eq!(got.text, want, "{what}");
                assert_eq!(generated(&got), spans(want, &row["spans"]), "{what}");
                rendered += 1;
            }
            (Err(_), None) => raised += 1,
            (got, _) => panic!("{what}: {got:?}"),
        }
    }
    assert_eq!((rendered, raised), (306, 114));
}

/// Expressions, statements, filters, tests, methods and white space, a line each.
#[test]
fn jinja_is_rendered_as_jinja2_renders_it() {
    let dir = golden::path("chat");
    let variables = json(&dir.join("variables.json"));
    let variables: Vec<(&str, Variable<'_>)> =
        variables.as_object().unwrap().iter().map(|(k, v)| (&**k, Variable::Given(v))).collect();
    let mut wrong = Vec::new();
    for row in lines(&dir.join("features.jsonl")) {
        let source = row["source"].as_str().unwrap();
        let now = noon("2026-01-01").unwrap();
        let template = Template::parse(source);
        let got = template.as_ref().map_err(Clone::clone).and_then(|t| t.render(&variables, now));
        let text = got.as_ref().ok().map(|r| r.text.as_str());
        if text != row["out"].as_str() {
            wrong.push(format!("{source}\n  got    {got:?}\n  wanted {}", row["out"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Templates of 100 models and the renderings of `transformers`. Their licences do not allow to
/// have them here: this runs where they lie beside the checkout.
#[test]
#[ignore = "needs ../shared/fixtures/golden"]
fn templates_of_a_hundred_models_render_as_transformers_renders_them() {
    let dir = root().join("../shared/fixtures/golden");
    let all = Conversations::read(&dir.join("conversations.json"));
    let now = noon("2026-07-26").unwrap();
    let (mut equal, mut masks, mut raised) = (0, 0, 0);
    for row in lines(&dir.join("templates.jsonl")) {
        let name = row["template"].as_str().unwrap();
        let source = fs::read_to_string(dir.join("templates").join(name)).unwrap();
        let conversation = row["conversation"].as_str().unwrap();
        let got = Template::parse(&source)
            .and_then(|template| all.render(&template, conversation, &row, now));
        let what = format!("{name} {conversation}");
        match (got, row["out"].as_str()) {
            (Ok(got), Some(want)) => {
                assert_eq!(got.text, want, "{what}");
                equal += 1;
                if !row["assistant_spans"].is_null() {
                    let want = spans(want, &row["assistant_spans"]);
                    assert_eq!(generated(&got), want, "{what}");
                    masks += 1;
                }
            }
            (Err(e), None) => {
                let own = row["error"]["kind"] == "raise_exception";
                let message = row["error"]["message"].as_str().unwrap();
                assert!(!own || e.starts_with(message), "{what}: {e}, wanted {message}");
                raised += 1;
            }
            (got, _) => panic!("{what}: {got:?}, wanted {}", row["error"]),
        }
    }
    assert_eq!((equal, raised, masks), (3009, 591, 1033));
}

/// The text of a hostile template: as it is, or pieces, of which a number repeats the one before.
fn hostile(row: &Value) -> String {
    if let Some(source) = row["source"].as_str() {
        return source.to_owned();
    }
    let Some(pieces) = row["make"].as_array() else {
        let each = (0..20_000).map(|i| format!("{{% elif x == {i} %}}a"));
        return format!("{{% if x == 0 %}}{}{{% endif %}}", each.collect::<String>());
    };
    let mut out = String::new();
    for (i, piece) in pieces.iter().enumerate() {
        if let Some(text) = piece.as_str() {
            let times = pieces.get(i + 1).and_then(Value::as_u64).unwrap_or(1);
            out += &text.repeat(times as usize);
        }
    }
    out
}

/// Every one ends within a second and 100 MB, whatever it does; harmless work is done.
#[test]
fn hostile_templates_are_errors() {
    let messages = serde_json::json!([
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    ]);
    let (null, mut slowest, mut largest) = (Value::Null, Duration::ZERO, 0);
    let rows = lines(&golden::path("chat").join("hostile.jsonl"));
    assert_eq!(rows.len(), 204);
    for row in rows {
        let (name, must, source) = (row["name"].as_str().unwrap(), &row["must"], hostile(&row));
        let render = || {
            let variables = [
                ("messages", Variable::Given(&messages)),
                ("tools", Variable::Given(&null)),
                ("bos_token", Variable::Written("<s>")),
            ];
            Template::parse(&source)?.render(&variables, 0).map(|r| r.text)
        };
        // Other tests take the same cores: the quicker of three counts.
        let mut quickest = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            let (got, bytes) = memory::most(render);
            quickest = quickest.min(start.elapsed());
            largest = largest.max(bytes);
            let text = got.as_deref().unwrap_or_default();
            match must.as_str().unwrap() {
                "limit" | "refuse" => assert!(got.is_err(), "{name}: {}", text.len()),
                "render" => match row["out"].as_str() {
                    Some(want) => assert_eq!(got, Ok(want.to_owned()), "{name}"),
                    None => assert_eq!(text.chars().count() as u64, row["chars"], "{name}"),
                },
                "no_leak" => assert!(!text.contains("class") && !text.contains("uid="), "{name}"),
                "no_mutation" => assert!(got.is_err() || text == "2" || text == "hi", "{name}"),
                _ => {}
            }
            if quickest < Duration::from_secs(1) {
                break;
            }
        }
        assert!(quickest < Duration::from_secs(1), "{name} takes {quickest:?}");
        slowest = slowest.max(quickest);
    }
    println!("at most {slowest:?} and {largest} bytes");
    assert!(largest < 100 << 20, "{largest} bytes");
    let large = "x".repeat(50 << 20);
    assert!(Template::parse(&large).unwrap_err().contains("wanted at most"));
}

/// Who wrote what is known, whatever the template does with it.
#[test]
fn each_character_knows_who_wrote_it() {
    let conversation = serde_json::json!({"a": " <b>", "list": ["x,y", "z"]});
    for (source, want) in [
        ("[{{ v.a }}]", "[( <b>)]"),
        ("{{ v.a | trim | upper }}!", "(<B>)!"),
        ("{{ v.a.replace('b', 'q') }}", "( <)q(>)"),
        ("{{ v.list[0].split(',')[1] ~ '-' }}{{ v.list | join('+') }}", "(y)-(x,y)+(z)"),
        (
            "{{ v.a | tojson }}{{ v | tojson }}",
            "\"( <b>)\"{\"(a)\": \"( <b>)\", \"(list)\": [\"(x,y)\", \"(z)\"]}",
        ),
        ("{% set x %}<{{ v.a[1:] }}{% endset %}{{ x[::-1] }}", "(>b<)<"),
        ("{% macro f(x) %}{{ x * 2 }}{% endmacro %}{{ f(v.list[1]) + 'z' }}", "(zz)z"),
        ("{{ v.list }}{{ ' <b>' == v.a }}{{ '%s' in v.a }}", "['(x,y)', '(z)']TrueFalse"),
    ] {
        let got = Template::parse(source).unwrap();
        let got = got.render(&[("v", Variable::Given(&conversation))], 0).unwrap();
        let mut text = got.text.clone();
        for range in got.given.iter().rev() {
            text.insert(range.end, ')');
            text.insert(range.start, '(');
        }
        assert_eq!(text, want, "{source}");
    }
}

#[test]
fn an_error_of_a_template_names_its_line() {
    for (source, want) in [
        ("a\n{{ 1 + }}", "got the end of the tag, wanted an expression in line 2"),
        ("{% if x %}\n\n", "got the end of the template, wanted `endif` in line"),
        ("a\n\n{% nosuch %}", "there is no tag `nosuch` in line 3"),
        ("\n{{ 'a'|nosuch }}", "there is no filter `nosuch` in line 2"),
        ("\n{{ 'a' is nosuch }}", "there is no test `nosuch` in line 2"),
        ("{{ nosuch() }}", "'nosuch' is undefined in line 1"),
        ("{{ 'a'.nosuch() }}", "'str object' has no attribute 'nosuch' in line 1"),
        ("{{ raise_exception('mine') }}", "mine in line 1"),
        ("{{ strftime_now('%Q') }}", "strftime_now has no `%Q` in line 1"),
        ("{{ x", "a tag does not end in line 1"),
        ("{# x", "a comment does not end in line 1"),
        ("{% include 'x' %}", "there is no tag `include` in line 1"),
    ] {
        let got = Template::parse(source).and_then(|t| t.render(&[], 0)).unwrap_err();
        assert!(got.starts_with(want), "{source}: {got}, wanted {want}");
    }
}
