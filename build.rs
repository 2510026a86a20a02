//! Compiles `kernels/*.cu` with nvcc, where there is one, and writes the structs that launch them.
//! them.
//!
//! Each file becomes one fatbin: machine code for sm_80 and sm_90a, and PTX that the driver
//! translates for newer GPUs; those named `*_sm90.cu` machine code for sm_90a alone. What did not
//! change is not compiled again. Without nvcc the images are empty and everything but the CUDA
//! device works; `WARPO_KERNELS=require` makes that an error, `WARPO_KERNELS=none` does not look
//! for nvcc.

use std::{
    collections::hash_map::DefaultHasher,
    env, fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

#[path = "kernels/scan.rs"]
mod scan;
use scan::Entry;

const HOPPER: &str = "arch=compute_90a,code=sm_90a";
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    HOPPER,
    // `compute_80` PTX runs on whatever comes later
    "arch=compute_80,code=compute_80",
];

const FLAGS: [&str; 8] = [
    "--fatbin",
    "-O3",
    "-std=c++17",
    // A product is fused with a sum where the source says fmaf and nowhere else: so two kernels
    // that share a line share its bits, and the simulator computes what a GPU computes.
    "-fmad=false",
    "-lineinfo",
    "-Werror=all-warnings",
    "-Xfatbin=-compress-all",
    "-Xptxas=-v,--warning-as-error",
];

fn main() {
    if let Err(message) = build() {
        message.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    for name in ["WARPO_KERNELS", "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = sources("kernels")?;
    // For tests alone: kernels with a mistake each, and what a tensor core's lanes hold.
    let checks = sources("kernels/sim")?;

    let wanted = env::var("WARPO_KERNELS").unwrap_or_default();
    let nvcc = if wanted == "none" || env::var_os("DOCS_RS").is_some() { None } else { nvcc() };
    match (&nvcc, wanted.as_str()) {
        (Some(nvcc), _) => compile(nvcc, &[&kernels[..], &checks].concat(), &out)?,
        (None, "require") => {
            return Err("WARPO_KERNELS=require, but there is no nvcc in $NVCC, $CUDA_HOME/bin, \
                        $PATH, /usr/local/cuda/bin or the Python environment $VIRTUAL_ENV"
                .into());
        }
        (None, "none") => {}
        (None, _) => println!(
            "cargo::warning=nvcc was not found: this build has no CUDA kernels and computes on the CPU. \
             Set NVCC=/path/to/nvcc to have them."
        ),
    }
    let cuda = nvcc.as_deref().map_or(Ok(0), cuda_version)?;
    let mut code = format!(
        "/// Whether this binary has kernels for a GPU.\npub const BUILT: bool = {};\n\
         /// The CUDA of the nvcc that made them, 1000 times the major version and 10 times the \
         minor one.\npub const CUDA: i32 = {cuda};\n",
        nvcc.is_some()
    );
    for source in &kernels {
        code += &module(source, nvcc.is_some())?;
    }
    if nvcc.is_none() {
        for check in &checks {
            // No image, and no key that would keep the next build from making one.
            write(&out.join(stem(check)).with_extension("fatbin"), "")?;
            write(&out.join(stem(check)).with_extension("key"), "")?;
        }
    }
    write(&out.join("kernels.rs"), &code)
}

/// $NVCC, then the toolkit's usual places, then the wheels of a Python environment.
fn nvcc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("NVCC") {
        return Some(path.into());
    }
    let home = |name| env::var_os(name).map(|d| Path::new(&d).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(home).collect();
    places.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
    places.push("/usr/local/cuda/bin/nvcc".into());
    if let Some(env) = env::var_os("VIRTUAL_ENV") {
        let pythons = read_dir(Path::new(&env).join("lib")).unwrap_or_default();
        places.extend(pythons.iter().map(|p| p.join("site-packages/nvidia/cu13/bin/nvcc")));
    }
    places.into_iter().find(|p| p.is_file())
}

/// As drivers count versions: 13000 for 13.0.
fn cuda_version(nvcc: &Path) -> Result<u32, String> {
    let text = run(Command::new(nvcc).arg("--version"))?;
    let numbers = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let version = numbers.and_then(|v| v.split_once('.')).and_then(|(major, minor)| {
        Some(1000 * major.parse::<u32>().ok()? + 10 * minor.parse::<u32>().ok()?)
    });
    version.ok_or_else(|| format!("{} --version names no release:\n{text}", nvcc.display()))
}

/// One fatbin a file, as many at a time as cargo allows; compiled again only if the compiler, its
/// flags, the file or anything that it includes changed.
fn compile(nvcc: &Path, sources: &[PathBuf], out: &Path) -> Result<(), String> {
    let version = run(Command::new(nvcc).arg("--version"))?;
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (queue, failed) = (Mutex::new(sources.iter()), Mutex::new(Vec::new()));
    let next = || queue.lock().ok().and_then(|mut q| q.next());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = next() {
                    if let (Err(e), Ok(mut all)) = (one(nvcc, &version, source, out), failed.lock())
                    {
                        all.push(e);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

fn one(nvcc: &Path, version: &str, source: &Path, out: &Path) -> Result<(), String> {
    let file = |end: &str| out.join(stem(source)).with_extension(end);
    let (fatbin, depends, key) = (file("fatbin"), file("d"), file("key"));
    let targets = if scan::sm90(&stem(source)) { &[HOPPER][..] } else { &TARGETS };
    let hash = || {
        let mut h = DefaultHasher::new();
        (version, FLAGS, targets).hash(&mut h);
        let names = fs::read_to_string(&depends).unwrap_or_default().replace("\\\n", " ");
        for name in names.split_once(": ").map_or("", |n| n.1).split_whitespace() {
            fs::read(name).ok().hash(&mut h);
        }
        h.finish().to_string()
    };
    if fatbin.exists() && fs::read_to_string(&key).is_ok_and(|k| k == hash()) {
        return Ok(());
    }
    let aside = file("tmp");
    let mut command = Command::new(nvcc);
    command.args(FLAGS).args(targets.iter().flat_map(|t| ["-gencode", t]));
    command.arg("-MD").arg("-MF").arg(&depends).arg("-o").arg(&aside).arg(source);
    let report = run(&mut command)?;
    // registers, spills and shared memory of every kernel, which a test reads
    write(&file("ptxas"), &report)?;
    fs::rename(&aside, &fatbin).map_err(|e| format!("{}: {e}", fatbin.display()))?;
    write(&key, &hash())
}

/// What a command prints, on both streams.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|e| format!("cannot run {name}: {e}"))?;
    let text = [done.stdout, done.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if done.status.success() { Ok(text) } else { Err(format!("{name} failed:\n{text}")) }
}

/// The .cu files of a folder.
fn sources(dir: &str) -> Result<Vec<PathBuf>, String> {
    let mut all = read_dir(dir)?;
    all.retain(|p| p.extension().is_some_and(|x| x == "cu"));
    all.sort();
    Ok(all)
}

fn stem(source: &Path) -> String {
    source.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

fn read_dir(dir: impl AsRef<Path>) -> Result<Vec<PathBuf>, String> {
    let dir = dir.as_ref();
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(entries.flatten().map(|e| e.path()).collect())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The Rust module of a .cu file: its image, its constants, and a struct for each family of
/// kernels.
///
/// Kernels of a family differ in what is stored (`_bf16`, `_f32`) and in a size before that (`_64`,
/// `_128x256`) only.
fn module(source: &Path, compiled: bool) -> Result<String, String> {
    let text = scan::source(source).map_err(|e| format!("{}: {e}", source.display()))?;
    let stem = stem(source);
    let arch = if scan::sm90(&stem) { "Sm90" } else { "Sm80" };
    let bytes = match compiled {
        true => format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))"),
        false => "&[]".into(),
    };
    let mut code = format!(
        "/// `kernels/{stem}.cu`\npub mod {stem} {{\n    use super::*;\n    \
         static IMAGE: Image = Image {{ name: \"{stem}\", arch: Arch::{arch}, bytes: {bytes} }};\n"
    );
    for (name, value) in scan::constants(&text) {
        code += &format!("    pub const {name}: usize = {value};\n");
    }
    let entries = scan::entries(&text).map_err(|m| format!("{}: {m}", source.display()))?;
    let mut names: Vec<&str> = entries.iter().map(|e| e.family().0).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let kernels: Vec<&Entry> = entries.iter().filter(|e| e.family().0 == name).collect();
        code += &family(&stem, name, &kernels).map_err(|m| format!("{name}: {m}"))?;
    }
    Ok(code + "}\n")
}

/// The struct of a family's arguments, whose `launch` runs the kernel for the caller's types and
/// size.
fn family(stem: &str, name: &str, kernels: &[&Entry]) -> Result<String, String> {
    let stored = kernels.iter().find(|e| e.name.ends_with("_bf16"));
    let other = kernels.iter().find(|e| !e.name.ends_with("_bf16"));
    let first = stored.or(other).ok_or("no kernel")?;
    let rank = first.family().1.len();
    for e in kernels {
        let params = |e: &Entry| -> Vec<_> {
            e.params.iter().map(|p| (p.c.replace("bf16", "float"), p.name.clone())).collect()
        };
        if params(first) != params(e) || e.family().1.len() != rank {
            return Err(format!("{} and {} differ in more than bf16", first.name, e.name));
        }
    }
    let (mut fields, mut args, mut floats) = (String::new(), String::new(), false);
    for p in &first.params {
        let own = &p.name;
        if p.c == "TENSOR_MAP" {
            fields += &format!("        pub {own}: Map<'a>,\n");
            args += &format!("            args.map(self.{own});\n");
            continue;
        }
        let pointer = p.c.strip_suffix('*').map(|c| (c.trim_start_matches("const "), c));
        let element = match pointer.map_or(p.c.as_str(), |(element, _)| element) {
            "bf16" if stored.is_some() => "T",
            "bf16" => "half::bf16",
            "float" if stored.is_some() => "T::Acc",
            "float" => "T",
            "double" => "f64",
            "uint32_t" => "u32",
            "uint64_t" => "u64",
            // A count: what a kernel holds in an int is checked when it is passed.
            "int" if pointer.is_none() => "usize",
            "int" => "i32",
            _ => return Err(format!("type `{}`?", p.c)),
        };
        floats |= element.starts_with('T');
        let Some((bare, whole)) = pointer else {
            let pass = if element == "usize" { "count" } else { "value" };
            fields += &format!("        pub {own}: {element},\n");
            args += &format!("            args.{pass}(\"{own}\", self.{own});\n");
            continue;
        };
        let (view, pass) = if bare == whole { ("ViewMut", "write") } else { ("View", "read") };
        let view = format!("{view}<'a, {element}>");
        let (field, some) = match p.optional {
            true => (format!("Option<{view}>"), format!("self.{own}")),
            false => (view, format!("Some(self.{own})")),
        };
        fields += &format!("        pub {own}: {field},\n");
        args += &format!("            args.{pass}(\"{own}\", {some}, {});\n", p.packed);
    }
    let all: String = kernels
        .iter()
        .map(|e| {
            let size = e.family().1;
            let dtype = if e.name.ends_with("_bf16") { "BF16" } else { "F32" };
            format!(
                "                Kernel {{ image: &IMAGE, name: \"{}\", dtype: \"{dtype}\", \
                 size: &{size:?}, threads: {}, cluster: {}, beside: {} }},\n",
                e.name, e.threads, e.cluster, e.beside
            )
        })
        .collect();
    let (generic, own, of) = match (floats, stored, other) {
        (true, None, _) => ("<'a, T: Float>", "<'a, T>", "T"),
        (true, Some(_), _) => ("<'a, T: Element>", "<'a, T>", "T"),
        (false, Some(_), None) => ("<'a>", "<'a>", "half::bf16"),
        (false, None, _) => ("<'a>", "<'a>", "f32"),
        (false, Some(_), Some(_)) => return Err("bf16 and f32, but no float".into()),
    };
    let short = name.strip_prefix(&format!("{stem}_")).unwrap_or(name);
    let (size, at) = match rank {
        0 => (String::new(), "[]"),
        1 => ("size: usize, ".into(), "[size]"),
        n => (format!("size: [usize; {n}], "), "size"),
    };
    let sizes = match rank {
        1 => {
            let mut sizes: Vec<usize> = kernels.iter().map(|e| e.family().1[0]).collect();
            sizes.sort_unstable();
            sizes.dedup();
            let all = short.to_uppercase();
            format!("    pub const {all}_SIZES: &[usize] = &{sizes:?};\n")
        }
        _ => String::new(),
    };
    let short: String =
        short.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
    Ok(format!(
        "{sizes}    /// Arguments of `{name}`.\n    \
         #[derive(Debug)]\n    \
         pub struct {short}{generic} {{\n{fields}    }}\n    \
         impl{generic} {short}{own} {{\n        \
         const KERNELS: &'static [Kernel] = &[\n{all}        ];\n        \
         /// Blocks of such a launch that a multiprocessor holds at once.\n        \
         pub fn resident(cuda: &Cuda, {size}launch: Launch) -> Result<u32> {{\n            \
         cuda.resident(Kernel::find::<{of}>(Self::KERNELS, \"{name}\", &{at})?, launch)\n        }}\n        \
         /// Refuses types, sizes and memories that no kernel takes.\n        \
         pub fn launch(self, cuda: &Cuda, {size}launch: Launch) -> Result<()> {{\n            \
         let mut args = Args::default();\n{args}            \
         cuda.launch(Kernel::find::<{of}>(Self::KERNELS, \"{name}\", &{at})?, launch, args)\n        }}\n    }}\n"
    ))
}
