//! Reads the KERNEL lines and the constants of a .cu file. Used by build.rs and by the tests.

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

/// All entries of a source text, in order. Threads and cluster may be a number or a constant of the
/// same file.
pub fn entries(text: &str) -> Result<Vec<Entry>, String> {
    let mut all = Vec::new();
    for part in text.split("\nKERNEL(").skip(1) {
        let head = part.split_once(')').ok_or("KERNEL without )")?;
        let mut words = head.0.split(',').map(str::trim);
        let threads = words.next().unwrap_or_default();
        let name = words.next().ok_or("KERNEL without a name")?.to_owned();
        let (cluster, beside) = (words.next().unwrap_or("1"), words.next().unwrap_or("1"));
        let number = |what: &str, word: &str| {
            let constant = || constants(text).into_iter().find(|c| c.0 == word).map(|c| c.1);
            word.parse().ok().or_else(constant).ok_or(format!("{name}: {what}?"))
        };
        let threads = number("threads", threads)?;
        let cluster = number("cluster", cluster)?;
        let beside = number("beside", beside)?;
        let params = head.1.strip_prefix('(').and_then(|p| p.split_once(')'));
        let (params, _) = params.ok_or(format!("{name}: parameters?"))?;
        let param = |p: &str| {
            let mut words: Vec<&str> = p.split_whitespace().collect();
            let mut word =
                |w| words.iter().position(|x| *x == w).map(|i| words.remove(i)).is_some();
            let (optional, packed) = (word("OPTIONAL"), word("PACKED"));
            let own = words.pop().ok_or(format!("{name}: parameter `{p}`?"))?;
            Ok::<_, String>(Param { c: words.join(" "), name: own.to_owned(), optional, packed })
        };
        let params = params.split(',').map(param).collect::<Result<_, _>>()?;
        all.push(Entry { name, threads, cluster, beside, params });
    }
    Ok(all)
}

/// Whether a .cu file of this stem is for Hopper, which alone has TMA, wgmma and clusters.
pub fn sm90(stem: &str) -> bool {
    stem.ends_with("_sm90")
}

/// The lines `constexpr int NAME = number;` of a source text.
pub fn constants(text: &str) -> Vec<(String, u32)> {
    let line = |l: &str| {
        let (name, value) = l.strip_prefix("constexpr int ")?.split_once(" = ")?;
        Some((name.to_owned(), value.split(';').next()?.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}
