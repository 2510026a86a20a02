//! Reads the KERNEL lines and the constants of a .cu file. Used by build.rs and by the tests.

use std::{fs, io, path::Path};

/// An entry point: `KERNEL(threads, name)(parameters)`, `KERNEL(threads, name,
/// cluster)(parameters)`, or with the blocks that share a multiprocessor's registers after that.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// As the driver knows it.
    pub name: String,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks of a cluster, 1 without.
    pub cluster: u32,
    /// Blocks that share a multiprocessor's registers; 1 where it is not said.
    pub beside: u32,
    /// In order.
    pub params: Vec<Param>,
}

/// A parameter of an entry point.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Its C type, without the words below; `TENSOR_MAP` is one.
    pub c: String,
    /// Its name.
    pub name: String,
    /// `OPTIONAL`: a pointer that may be null.
    pub optional: bool,
    /// `PACKED`: a pointer to whole packets of 16 bytes.
    pub packed: bool,
}

impl Entry {
    /// The name without the type (`_bf16`, `_f32`) and the size before it (`_64`, `_128x256`), and
    /// the numbers of the size.
    pub fn family(&self) -> (&str, Vec<usize>) {
        let bare = ["_bf16", "_f32"].iter().find_map(|s| self.name.strip_suffix(s));
        let bare = bare.unwrap_or(&self.name);
        let size = |s: &str| s.split('x').map(|n| n.parse().ok()).collect::<Option<_>>();
        let sized = bare.rsplit_once('_').and_then(|(name, end)| Some((name, size(end)?)));
        sized.unwrap_or((bare, Vec::new()))
    }
}

/// A .cu file, with what it includes before it.
pub fn source(path: &Path) -> io::Result<String> {
    let own = fs::read_to_string(path)?;
    let mut all = String::new();
    for name in own.lines().filter_map(|l| l.strip_prefix("#include \"")?.strip_suffix('"')) {
        all += &source(&path.with_file_name(name))?;
    }
    Ok(all + &own)
}

/// All entries of a source text, in order.
pub fn entries(text: &str) -> Result<Vec<Entry>, String> {
    let constants = constants(text);
    let mut all = Vec::new();
    for part in expand(text)?.split("\nKERNEL(").skip(1) {
        let head = part.split_once(')').ok_or("KERNEL without )")?;
        let mut words = head.0.split(',').map(str::trim);
        let threads = words.next().unwrap_or_default();
        let name = words.next().ok_or("KERNEL without a name")?.to_owned();
        let (cluster, beside) = (words.next().unwrap_or("1"), words.next().unwrap_or("1"));
        let number =
            |what: &str, word| value(word, &constants).ok_or(format!("{name}: {what} `{word}`?"));
        let threads = number("threads", threads)?;
        let cluster = number("cluster", cluster)?;
        let beside = number("beside", beside)?.max(1);
        let params = head.1.trim_start().strip_prefix('(').and_then(|p| p.split_once(')'));
        let (params, _) = params.ok_or(format!("{name}: parameters?"))?;
        let param = |p: &str| {
            let mut words: Vec<&str> = p.split_whitespace().collect();
            let mut word =
                |w| words.iter().position(|x| *x == w).map(|i| words.remove(i)).is_some();
            let (optional, packed) = (word("OPTIONAL"), word("PACKED"));
            let own = words.pop().ok_or(format!("{name}: parameter `{p}`?"))?;
            let c = words.join(" ").replace("f32", "float");
            Ok::<_, String>(Param { c, name: own.to_owned(), optional, packed })
        };
        let params = params.split(',').map(param).collect::<Result<_, _>>()?;
        all.push(Entry { name, threads, cluster, beside, params });
    }
    Ok(all)
}

/// A number, a constant, or `a <= b ? c : d` or `a == b ? c : d` of such.
fn value(word: &str, constants: &[(String, u32)]) -> Option<u32> {
    let value = |word: &str| value(word.trim(), constants);
    let Some((test, branches)) = word.split_once('?') else {
        return word.parse().ok().or_else(|| constants.iter().find(|c| c.0 == word).map(|c| c.1));
    };
    let holds = match (test.split_once("<="), test.split_once("==")) {
        (Some((a, b)), _) => value(a)? <= value(b)?,
        (_, Some((a, b))) => value(a)? == value(b)?,
        _ => return None,
    };
    let (yes, no) = branches.split_once(':')?;
    value(if holds { yes } else { no })
}

/// The text, in which each line `EACH_LIST(MACRO)` is the body of MACRO for each `X(..)` of the
/// list: of the preprocessor what kernels need, `#define EACH_LIST(X) X(a, b) X(c, d)` and `##`.
fn expand(text: &str) -> Result<String, String> {
    let text = text.replace("\\\n", " ");
    let macros: Vec<(&str, &str, &str)> = text
        .lines()
        .filter_map(|l| {
            let (name, rest) = l.strip_prefix("#define ")?.split_once('(')?;
            let (params, body) = rest.split_once(')')?;
            Some((name, params, body))
        })
        .collect();
    let find = |name: &str| {
        let found = macros.iter().find(|m| m.0 == name);
        found.ok_or(format!("no `#define {name}(..)`"))
    };
    let mut out = String::new();
    for line in text.lines() {
        out.push('\n');
        let call = line.strip_suffix(')').filter(|l| l.starts_with("EACH_"));
        let Some((list, each)) = call.and_then(|l| l.split_once('(')) else {
            out += line;
            continue;
        };
        let (_, params, body) = find(each)?;
        for values in find(list)?.2.split("X(").skip(1).map(|x| x.split(')').next()) {
            let values: Vec<&str> = values.unwrap_or_default().split(',').map(str::trim).collect();
            let params: Vec<&str> = params.split(',').map(str::trim).collect();
            if values.len() != params.len() {
                return Err(format!("{list}: {values:?} for {params:?} of {each}"));
            }
            let mut words = String::new();
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let mut rest = *body;
            while let Some(first) = rest.chars().next() {
                let end = rest.find(|c| word(c) != word(first)).unwrap_or(rest.len());
                let (own, after) = rest.split_at(end);
                words += params.iter().position(|p| *p == own).map_or(own, |i| values[i]);
                rest = after;
            }
            out += &words.replace("##", "").replace("KERNEL(", "\nKERNEL(");
        }
    }
    Ok(out)
}

/// Whether a .cu file of this stem is for Hopper, which alone has TMA, wgmma and clusters.
pub fn sm90(stem: &str) -> bool {
    stem.ends_with("_sm90")
}

/// The lines `constexpr int NAME = number;` of a source text, each once.
pub fn constants(text: &str) -> Vec<(String, u32)> {
    let line = |l: &str| {
        let (name, value) = l.strip_prefix("constexpr int ")?.split_once(" = ")?;
        Some((name.to_owned(), value.split(';').next()?.trim().parse().ok()?))
    };
    let mut all: Vec<(String, u32)> = text.lines().filter_map(line).collect();
    all.sort();
    all.dedup();
    all
}
