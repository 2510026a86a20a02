//! What the compilers say about the kernels: registers, spills, wide loads; and the rules of their
//! source.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use warpo::device::cuda::kernels::BUILT;

use crate::support::sim::{files, scan};

/// Kernels that may spill or use local memory, and why.
const MAY_SPILL: [(&str, &str); 0] = [];

/// Of sm_80 and sm_90 alike.
const REGISTERS: u32 = 65_536;
const THREADS: u32 = 2048;
const BLOCKS: u32 = 32;

/// ptxas on a kernel for one architecture.
#[derive(Debug, Default)]
struct Report {
    registers: u32,
    stack: u32,
    spills: u32,
}

/// `kernels/`.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Every .cu file: its stem, text and entries.
pub(super) fn sources() -> Vec<(String, String, Vec<scan::Entry>)> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let entries = scan::entries(&scan::source(&path).unwrap()).unwrap();
        (path.file_stem().unwrap().to_str().unwrap().to_owned(), text, entries)
    };
    files(&folder(), "cu").into_iter().map(read).collect()
}

/// The number before `what` in a line of ptxas.
fn number(line: &str, what: &str) -> u32 {
    let before = line.split(what).next().unwrap().trim();
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

/// By kernel and architecture.
fn reports(text: &str) -> BTreeMap<(String, String), Report> {
    let mut all: BTreeMap<_, Report> = BTreeMap::new();
    let mut at = None;
    for line in text.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2).map(str::to_owned);
            at = Some((quoted.next().unwrap(), quoted.next().unwrap()));
        }
        let Some(at) = &at else { continue };
        let report = all.entry(at.clone()).or_default();
        if line.contains("bytes stack frame") {
            report.stack = number(line, " bytes stack frame");
            report.spills =
                number(line, " bytes spill stores") + number(line, " bytes spill loads");
        }
        if line.contains("Used ") {
            report.registers = number(line, " registers");
        }
    }
    all
}

impl Report {
    /// Percent of a multiprocessor's threads that fit; shared memory, which the launch decides, is
    /// not counted.
    fn occupancy(&self, threads: u32) -> u32 {
        // Registers are given to warps in units of 8 a thread.
        let by_registers = REGISTERS / (self.registers.next_multiple_of(8) * threads);
        100 * by_registers.min(THREADS / threads).min(BLOCKS) * threads / THREADS
    }
}

/// What a .cu file is compiled for.
fn architectures(stem: &str) -> &'static [&'static str] {
    if scan::sm90(stem) { &["sm_90a"] } else { &["sm_80", "sm_90a"] }
}

/// What ptxas said of a .cu file.
fn said_of(stem: &str) -> String {
    fs::read_to_string(Path::new(env!("OUT_DIR")).join(format!("{stem}.ptxas"))).unwrap()
}

/// The reports of a .cu file.
fn reports_of(stem: &str) -> BTreeMap<(String, String), Report> {
    reports(&said_of(stem))
}

/// Prints a line for each kernel with `--nocapture`.
#[test]
fn no_kernel_spills() {
    if !BUILT {
        println!("built without nvcc: there is no report");
        return;
    }
    let row = |cells: [&str; 6]| {
        let [kernel, arch, registers, spills, threads, occupancy] = cells;
        println!("{kernel:34} {arch:8} {registers:>9} {spills:>6} {threads:>7} {occupancy:>9}");
    };
    row(["kernel", "", "registers", "spills", "threads", "occupancy"]);
    let mut bad = Vec::new();
    for (stem, _, entries) in sources() {
        let reports = reports_of(&stem);
        let archs = architectures(&stem);
        for (e, arch) in entries.iter().flat_map(|e| archs.iter().map(move |a| (e, a))) {
            let r = &reports[&(e.name.clone(), (*arch).to_owned())];
            let percent = r.occupancy(e.threads);
            let (registers, spills) = (r.registers.to_string(), r.spills.to_string());
            let (threads, percent) = (e.threads.to_string(), format!("{percent} %"));
            row([&e.name, arch, &registers, &spills, &threads, &percent]);
            let listed = MAY_SPILL.iter().any(|(name, _)| *name == e.name);
            if (r.spills > 0 || r.stack > 0) && !listed {
                bad.push(format!("{} for {arch}: {r:?}", e.name));
            }
        }
    }
    assert!(bad.is_empty(), "spills or local memory: {bad:#?}");
}

/// The table of .cu files in kernels/README.md is this one: what is tested, the most registers of a
/// kernel, all spills and the least occupancy for both architectures, and the GPUs of
/// `benches/results`. Prints it with `--nocapture`.
#[test]
fn kernels_readme_has_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("kernels/README.md")).unwrap();
    let results: Vec<(String, String)> = fs::read_dir(root.join("benches/results"))
        .into_iter()
        .flatten()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    let mut table = vec![
        "| kernels/ | simulator | sanitizers | registers sm_80 / sm_90a | spills | occupancy | GPU |"
            .to_owned(),
        "|---|---|---|---|---|---|---|".to_owned(),
    ];
    let all = sources();
    for (stem, _, entries) in &all {
        let op = match stem.trim_end_matches("_sm90") {
            // The kernel of all sums over tokens has no op of its own.
            "sums" => "nll",
            op => op.trim_end_matches("_backward"),
        };
        let tests: String = match stem.contains("_backward") {
            true => fs::read_to_string(root.join(format!("tests/ops/{op}/backward.rs"))).unwrap(),
            false => tests_of(op).iter().map(|path| fs::read_to_string(path).unwrap()).collect(),
        };
        let tested =
            tests.contains("sim::check(") && (!scan::sm90(stem) || tests.contains("hopper"));
        let tested = if tested { "yes" } else { "no" };
        // Where there is a file for Hopper, a Hopper GPU ran that and another GPU the other.
        let twins = all.iter().any(|(other, ..)| *other == format!("{op}_sm90"));
        let ran = |text: &str| {
            let hopper = text.contains("compute capability 9.0");
            text.contains(&format!("\"{op}")) && (!twins || hopper == scan::sm90(stem))
        };
        let gpus: Vec<&str> =
            results.iter().filter(|(_, text)| ran(text)).map(|(name, _)| name.as_str()).collect();
        let gpus = if gpus.is_empty() { "not yet".to_owned() } else { gpus.join(", ") };
        let start = format!("| {stem} | {tested} | {tested} | ");
        assert!(readme.contains(&start), "kernels/README.md has no line `{start}`");
        if !BUILT {
            continue;
        }
        let reports = reports_of(stem);
        let of = |arch: &&str| {
            let of = |e: &scan::Entry| (e.threads, &reports[&(e.name.clone(), (*arch).to_owned())]);
            let all: Vec<(u32, &Report)> = entries.iter().map(of).collect();
            let registers = all.iter().map(|(_, r)| r.registers).max().unwrap();
            let occupancy = all.iter().map(|(threads, r)| r.occupancy(*threads)).min().unwrap();
            (registers, all.iter().map(|(_, r)| r.spills).sum::<u32>(), occupancy)
        };
        let of_all: Vec<(u32, u32, u32)> = architectures(stem).iter().map(of).collect();
        let both = |number: fn(&(u32, u32, u32)) -> u32| {
            let mut texts: Vec<String> = of_all.iter().map(|r| number(r).to_string()).collect();
            if scan::sm90(stem) {
                texts.insert(0, "-".into());
            }
            texts.join(" / ")
        };
        let (registers, occupancy) = (both(|r| r.0), both(|r| r.2));
        let spills: u32 = of_all.iter().map(|r| r.1).sum();
        table.push(format!("{start}{registers} | {spills} | {occupancy} % | {gpus} |"));
    }
    let table = table.join("\n");
    println!("{table}");
    // Another nvcc uses other registers: the table is that of .ci/run's.
    if std::env::var("WARPO_KERNELS").as_deref() == Ok("require") {
        assert!(readme.contains(&table), "kernels/README.md has another table");
    }
}

/// Kernels that load no 16 bytes at once, and why.
const NARROW: [(&str, &str); 43] = [
    ("delta_rule_backward_bf16", "a column of a state has four lanes"),
    ("delta_rule_backward_f32", "a column of a state has four lanes"),
    ("delta_rule_forward_bf16", "a column of a state has four lanes"),
    ("delta_rule_forward_f32", "a column of a state has four lanes"),
    ("delta_rule_rows_bf16", "heads of any size, a lane each"),
    ("delta_rule_rows_f32", "heads of any size, a lane each"),
    ("delta_rule_sums_bf16", "a column of a row, rows a lane each"),
    ("delta_rule_sums_f32", "a column of a row, rows a lane each"),
    ("embedding_sort", "ids, a lane a row"),
    ("gae_forward", "sequences begin at any token, a lane a token"),
    ("gate_backward_bf16", "columns begin anywhere in their rows, a lane each"),
    ("gate_backward_f32", "columns begin anywhere in their rows, a lane each"),
    ("gate_copy_bf16", "columns begin anywhere in their rows, a lane each"),
    ("gate_copy_f32", "columns begin anywhere in their rows, a lane each"),
    ("gate_forward_bf16", "columns begin anywhere in their rows, a lane each"),
    ("gate_forward_f32", "columns begin anywhere in their rows, a lane each"),
    ("gate_rows_bf16", "rows of any length, a lane an element"),
    ("gate_rows_f32", "rows of any length, a lane an element"),
    ("gate_rows_backward_bf16", "rows of any length, a lane an element"),
    ("gate_rows_backward_f32", "rows of any length, a lane an element"),
    ("grad_norm_sum", "a sum of at most 256 numbers, in order"),
    ("kto_loss_forward", "sequences begin at any token, a lane a token"),
    ("logprob_from_logits_bf16", "rows begin anywhere, four lanes a chunk"),
    ("logprob_from_logits_f32", "rows begin anywhere, four lanes a chunk"),
    ("logprob_top", "keys of a list, a lane each"),
    ("next_ids_forward", "tokens from anywhere, a lane each"),
    ("norm_add_partials", "a column a lane, 128 bytes a warp"),
    ("policy_loss_forward", "a sequence a block, whose columns begin anywhere"),
    ("preference_loss_forward", "sequences begin at any token, a lane a token"),
    ("routing_backward_bf16", "a row of as many experts as there are, a lane each"),
    ("routing_backward_f32", "a row of as many experts as there are, a lane each"),
    ("routing_balance", "a row of as many experts as there are, a lane each"),
    ("routing_choose", "a row of as many experts as there are, a lane each"),
    ("routing_count", "experts of a share of pairs, a lane each"),
    ("routing_place", "experts of a share of pairs, a lane each"),
    ("routing_scan", "counts of shares, a lane an expert"),
    ("short_conv_backward_bf16", "a lane walks a channel"),
    ("short_conv_backward_f32", "a lane walks a channel"),
    ("short_conv_forward_bf16", "a lane walks a channel"),
    ("short_conv_forward_f32", "a lane walks a channel"),
    ("short_conv_sum", "a weight a lane"),
    ("sums_total", "a sum of at most 256 rows"),
    ("whiten_moments", "a sum of at most 256 rows"),
];

/// Files of matrix products, those whose main loops are counted, and their kernels that multiply
/// nothing.
const ON_TENSOR_CORES: [&str; 5] =
    ["attention", "attention_backward", "experts", "matmul", "logprob"];
const PRODUCTS: [&str; 4] = ["attention", "experts", "matmul", "logprob"];
const NO_PRODUCT: [(&str, &str); 13] = [
    ("attention_append_bf16", "a copy"),
    ("attention_backward_delta_bf16", "a dot product a row and head"),
    ("experts_bias_bf16", "a sum over an expert's rows, a lane a packet"),
    ("experts_bias_f32", "a sum over an expert's rows, a lane a packet"),
    ("experts_bias_weights_bf16", "a dot product a pair"),
    ("experts_bias_weights_f32", "a dot product a pair"),
    ("experts_glu_backward_bf16", "an activation, and a dot product a pair"),
    ("experts_glu_backward_f32", "an activation, and a dot product a pair"),
    ("logprob_from_logits_bf16", "logits that were multiplied before"),
    ("logprob_from_logits_f32", "logits that were multiplied before"),
    ("logprob_merge", "partial sums, a warp a row"),
    ("logprob_pick", "the best of each chunk, a row a warp"),
    ("logprob_top", "the lists of each chunk, a row a block"),
];

/// What the machine code of a kernel has, for every architecture that it is compiled for: loads of
/// 16 bytes, or copies to shared memory of as many or of whole boxes; nothing of local memory;
/// where a kernel is a matrix product, a tensor core's instructions, on Hopper those of a
/// warpgroup; and where a kernel moves registers between its warpgroups, as many at its start as
/// its launch bound leaves a thread.
#[test]
fn the_machine_code_is_what_was_meant() {
    let Some(tool) = cuobjdump() else { return };
    for (stem, _, entries) in sources() {
        let image = Path::new(env!("OUT_DIR")).join(format!("{stem}.fatbin"));
        let done = Command::new(&tool).arg("-sass").arg(image).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        let text = String::from_utf8(done.stdout).unwrap();
        let said = said_of(&stem);
        assert!(!said.contains("'setmaxnreg' ignored"), "kernels/{stem}.cu: {said}");
        // Where accumulators are touched while products are under way, ptxas waits after each.
        assert!(!said.contains("are serialized"), "kernels/{stem}.cu: {said}");
        let reports = reports(&said);
        let (hopper, archs) = (scan::sm90(&stem), architectures(&stem));
        let listed = |list: &[(&str, &str)], e: &scan::Entry| list.iter().any(|l| l.0 == e.name);
        for e in &entries {
            let name = format!("Function : {}\n", e.name);
            let parts: Vec<&str> = text.split(&name).skip(1).collect();
            assert_eq!(parts.len(), archs.len(), "{} for {archs:?}", e.name);
            for code in parts.iter().map(|code| code.split("Function : ").next().unwrap()) {
                let any = |words: &[&str]| {
                    code.lines().any(|line| words.iter().all(|word| line.contains(word)))
                };
                let wide = any(&["LDG.E", ".128"]) || any(&["LDGSTS", ".128"]) || any(&["UTMALDG"]);
                let narrow = listed(&NARROW, e);
                assert!(wide != narrow, "{} has a 128-bit load: {wide}", e.name);
                let local = any(&["LDL"]) || any(&["STL"]);
                assert!(!local || listed(&MAY_SPILL, e), "{} uses local memory", e.name);
                if ON_TENSOR_CORES.contains(&stem.trim_end_matches("_sm90")) {
                    let product = any(&[if hopper { "HGMMA" } else { "HMMA" }]);
                    let none = listed(&NO_PRODUCT, e);
                    assert!(product != none, "{} is on tensor cores: {product}", e.name);
                }
                if any(&["USETMAXREG"]) {
                    let registers = reports[&(e.name.clone(), "sm_90a".to_owned())].registers;
                    let threads = e.threads * e.beside;
                    assert_eq!(registers, REGISTERS / threads / 8 * 8, "{}", e.name);
                }
            }
        }
    }
}

/// The shortest way through the innermost loop of a kernel around its tensor instructions, for each
/// step of a warp.
struct Loop {
    /// Instructions of the tensor cores, and others.
    tensor: usize,
    others: usize,
    /// Clocks that a multiprocessor's quarter multiplies for: 256 multiply-adds a clock on sm_80,
    /// 512 on Hopper.
    clocks: usize,
}

impl Loop {
    /// The way has all tensor instructions of the loop, and each of `also`.
    fn of(code: &str, also: &[&str]) -> Option<Self> {
        // Address and text of each instruction.
        let lines: Vec<(usize, &str)> = code
            .lines()
            .filter_map(|line| {
                let (at, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
                Some((usize::from_str_radix(at, 16).ok()?, rest.split(';').next()?.trim()))
            })
            .collect();
        let target = |text: &str| {
            let to = text.split("BRA").nth(1)?.trim().rsplit(' ').next()?.strip_prefix("0x")?;
            usize::from_str_radix(to, 16).ok()
        };
        let tensor = |text: &str| text.contains("HMMA.16816") || text.contains("HGMMA.64x");
        let body = |(end, (at, text)): (usize, &(usize, &str))| {
            let to = target(text).filter(|to| to < at)?;
            let begin = lines.binary_search_by_key(&to, |l| l.0).ok()?;
            lines[begin..end].iter().any(|l| tensor(l.1)).then_some(&lines[begin..=end])
        };
        let body = lines.iter().enumerate().filter_map(body).min_by_key(|body| body.len())?;
        // By instruction, and what a way has met of what it must: the fewest instructions so far.
        let all = body.iter().filter(|l| tensor(l.1)).count();
        let mut ways = vec![BTreeMap::from([((0, 0), 0)])];
        ways.resize(body.len() + 1, BTreeMap::new());
        for (i, (_, text)) in body.iter().enumerate() {
            let met = also.iter().enumerate().filter(|(_, word)| text.contains(**word));
            let met: usize = met.map(|(bit, _)| 1 << bit).sum();
            // A branch without a predicate does not go on; one that leaves the loop or goes back is
            // not taken.
            let taken = target(text).and_then(|to| body.binary_search_by_key(&to, |l| l.0).ok());
            let on = (taken.is_none() || text.starts_with('@')).then_some(i + 1);
            for ((tensors, words), n) in std::mem::take(&mut ways[i]) {
                let key = (tensors + usize::from(tensor(text)), words | met);
                for next in [on, taken.filter(|to| *to > i)].into_iter().flatten() {
                    let least = ways[next].entry(key).or_insert(usize::MAX);
                    *least = (n + 1).min(*least);
                }
                if i + 1 == body.len() {
                    ways[i + 1].insert(key, n + 1);
                }
            }
        }
        let length = *ways[body.len()].get(&(all, (1 << also.len()) - 1))?;
        let clocks = |text: &&str| match text.split("HGMMA.64x").nth(1) {
            Some(n) => n.split('x').next().unwrap().parse::<usize>().unwrap() / 2,
            None => 8,
        };
        let clocks = body.iter().map(|l| l.1).filter(|text| tensor(text)).map(|t| clocks(&t)).sum();
        Some(Self { tensor: all, others: length - all, clocks })
    }

    /// Percent of the time to multiply that a scheduler needs to issue the loop's instructions.
    fn issue(&self) -> usize {
        100 * (self.tensor + self.others) / self.clocks
    }
}

/// A product's time is that of its tensor cores, if memory keeps up: the instructions of its loop
/// are issued in a fraction of it. Prints what is counted with `--nocapture`.
#[test]
fn a_products_loop_is_issued_while_it_multiplies() {
    let Some(tool) = cuobjdump() else { return };
    println!("{:40} {:>7} {:>7} {:>7} {:>7}", "loop of", "tensor", "others", "clocks", "issue");
    for (stem, _, entries) in sources() {
        if !PRODUCTS.contains(&stem.trim_end_matches("_sm90")) {
            continue;
        }
        let image = Path::new(env!("OUT_DIR")).join(format!("{stem}.fatbin"));
        let done = Command::new(&tool).arg("-sass").arg(image).output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        for e in entries.iter().filter(|e| !NO_PRODUCT.iter().any(|n| n.0 == e.name)) {
            // The first is for sm_80 where there are two.
            let code = text.split(&format!("Function : {}\n", e.name)).nth(1).unwrap();
            // Of attention the way on which lanes of a row agree on its maximum and weights are
            // packed.
            let also = if stem == "attention_sm90" { &["SHFL", "F2FP"][..] } else { &[] };
            let l = Loop::of(code.split("Function : ").next().unwrap(), also);
            let l = l.unwrap_or_else(|| panic!("{} has no such loop", e.name));
            let Loop { tensor, others, clocks } = l;
            println!("{:40} {tensor:7} {others:7} {clocks:7} {:5} %", e.name, l.issue());
            // Tiles of few rows wait for memory.
            let most = if clocks >= 512 && !e.name.starts_with("attention_sm90_forward_64x") {
                100
            } else {
                400
            };
            assert!(l.issue() < most, "{}: {} % of its time to issue", e.name, l.issue());
        }
    }
}

/// The files of an op's tests: its own, and those of its parts in a folder beside it.
fn tests_of(op: &str) -> Vec<PathBuf> {
    let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ops");
    let folder = ops.join(op);
    let parts = if folder.is_dir() { files(&folder, "rs") } else { Vec::new() };
    [vec![ops.join(op).with_extension("rs")], parts].concat()
}

/// It lies beside nvcc; none if there is none, which `WARPO_KERNELS=require` forbids.
pub(super) fn cuobjdump() -> Option<PathBuf> {
    let nvcc = std::env::var_os("NVCC").filter(|_| BUILT);
    let tool = nvcc.map(|n| Path::new(&n).with_file_name("cuobjdump")).filter(|t| t.is_file());
    if tool.is_none() {
        let text = "cuobjdump was not found beside $NVCC: the machine code is not looked at";
        assert!(std::env::var("WARPO_KERNELS").as_deref() != Ok("require"), "{text}");
        println!("{text}");
    }
    tool
}

/// Inline PTX and NVIDIA's intrinsics have a simulator body beside them, in ptx.cuh and
/// ptx_sm90.cuh.
#[test]
fn instructions_stay_in_ptx() {
    let mut all = files(&folder(), "cu");
    all.extend(files(&folder().join("include"), "cuh"));
    for path in all.iter().filter(|p| !p.ends_with("ptx.cuh") && !p.ends_with("ptx_sm90.cuh")) {
        for (i, line) in fs::read_to_string(path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for stray in
                ["asm", "__shfl", "__ballot", "__cvta", "__ldg", "__syncwarp", "__nv", "atomic"]
            {
                let code = code.replace("ptx::", "ptx_");
                let word = code.split(|c: char| !c.is_alphanumeric() && c != '_');
                let found = word.filter(|w| w.starts_with(stray)).count();
                assert_eq!(found, 0, "{}:{} has `{stray}`", path.display(), i + 1);
            }
        }
    }
}

/// A kernel file opens with the headings of the house; those of a loss stand in what it includes.
#[test]
fn kernels_open_with_their_headings() {
    let shared = ["include/token_loss.cuh", "include/sequence_loss.cuh"].map(|name| {
        (format!("#include \"{name}\""), fs::read_to_string(folder().join(name)).unwrap())
    });
    for (stem, text, entries) in sources() {
        let of = shared.iter().find(|(include, _)| text.contains(include));
        let text = of.map_or(&text, |(_, loss)| loss);
        let head: Vec<&str> = text.lines().take_while(|l| l.starts_with("//")).collect();
        for heading in ["shapes", "tiling", "memory", "numerics", "needs"] {
            let there = head.iter().any(|l| l.starts_with(&format!("//   {heading} ")));
            assert!(there, "kernels/{stem}.cu has no `{heading}`");
        }
        assert!(!entries.is_empty(), "kernels/{stem}.cu has no KERNEL");
        for e in entries {
            assert!(e.name.starts_with(&stem), "kernels/{stem}.cu has {}", e.name);
        }
    }
}

/// `.ci/gpu` finds the tests of kernels by their names.
#[test]
fn tests_of_kernels_are_named_so() {
    let ops = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ops"), "rs");
    let mut found = 0;
    for path in ops.iter().flat_map(|op| tests_of(op.file_stem().unwrap().to_str().unwrap())) {
        let text = fs::read_to_string(&path).unwrap();
        for test in text.split("#[test]\nfn ").skip(1).filter(|t| t.contains("sim::check(")) {
            let name = test.split('(').next().unwrap();
            assert!(name.contains("kernel"), "{}: {name}", path.display());
            found += 1;
        }
    }
    assert!(found > 10, "{found}");
}
