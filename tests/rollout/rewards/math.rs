//! What is the same answer, in a table of cases; where an answer stands.

use warpo::{
    rng::{Philox, Purpose},
    rollout::rewards::math::{final_answer, same_answer},
};

#[test]
fn math_knows_equal_answers_from_others() {
    let cases = include_str!("math_cases.tsv").lines().filter(|line| !line.starts_with('#'));
    let (mut count, mut wrong) = ([0, 0], Vec::new());
    for line in cases {
        let [a, b, same] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let want = same == "1";
        count[usize::from(want)] += 1;
        if same_answer(a, b) != want || same_answer(b, a) != want {
            wrong.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count[0] >= 200 && count[1] >= 200, "{count:?}");
}

#[test]
fn math_takes_the_last_answer_that_is_given() {
    for (text, want) in [
        (r"so \boxed{5}", Some("5")),
        (r"\boxed{4}, no: \boxed{5}", Some("5")),
        (r"\boxed{\frac{1}{2}} is it.", Some(r"\frac{1}{2}")),
        (r"\boxed{\{1, 2\}}", Some(r"\{1, 2\}")),
        (r"\boxed{\boxed{5}}", Some("5")),
        (r"\boxed {5}", Some("5")),
        (r"\boxed{ 5 }", Some("5")),
        (r"$\boxed{5}$", Some("5")),
        ("5 + 5 = 10\n#### 10", Some("10")),
        ("#### 9\n#### 10\nDone", Some("10")),
        ("####10", Some("10")),
        // A heading behind a box.
        ("\\boxed{4}\n#### 5", Some("4")),
        ("\\boxed{4}\n\n#### Check\nok", Some("4")),
        ("#### 4\n\\boxed{5}", Some("5")),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5", None),
        // Not the one before it, which was given up.
        (r"\boxed{4} \boxed{5", None),
        (r"\boxed{4} \boxed{}", None),
        (r"\boxed 5", None),
        (r"\boxed5", None),
        ("####", None),
        ("#### \n5", None),
        ("### 5", None),
        ("The answer is 5.", None),
        ("", None),
    ] {
        assert_eq!(final_answer(text), want, "{text:?}");
    }
}

/// Whatever a model writes is compared, without a panic and in little time; an answer that says
/// something is the same as itself.
#[test]
fn math_reads_whatever_is_written() {
    let pieces = [
        "1", "23", "0.5", "1e3", ",", ".", "-", "+", "/", "^", "{", "}", "(", ")", "[", "]", "\\{",
        "\\}", "\\frac", "\\sqrt", "[3]", "\\text{", "\\pi", "\\cup", "x", "cm", "%", "$", "=",
        "\\", "!", "\\left", "é", "√", "½", " ", "\\,", "million", "\\infty", "_", "&", "*", "·",
        "99999999",
    ];
    for seed in 0..20_000 {
        let draw = Philox::new(seed, 0, 0, Purpose::Init);
        let length = 1 + draw.below(0, 9);
        let text: String =
            (1..=length).map(|i| pieces[draw.below(i, pieces.len() as u32) as usize]).collect();
        let other = text.replacen('1', "2", 1);
        assert_eq!(same_answer(&text, &other), same_answer(&other, &text), "{text:?}");
    }
    for long in ["(", "{", "\\sqrt{", "\\sqrt[3]{99999999999}+", "-", "9", "(x+y)^9", "1/3+"] {
        let text = long.repeat(5000);
        let short = &text[..text.len().min(4000)];
        assert!(!same_answer(&text, "1") && !same_answer(short, "1"), "{long}");
    }
}
