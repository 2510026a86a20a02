//! What nvcc made of the kernels for Hopper, along every path through their machine code: the
//! registers of products under way, and those that a warpgroup has given away. Neither the
//! simulator nor ptxas looks at these.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    path::Path,
    process::Command,
};

use super::kernels::{cuobjdump, sources};
use crate::support::{sim::scan, temp_dir};

/// A set of the registers R0 to R254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Registers([u64; 4]);

impl Registers {
    fn range(first: usize, count: usize) -> Self {
        let mut all = Self::default();
        (first..first + count).for_each(|r| all.0[r / 64] |= 1 << (r % 64));
        all
    }

    fn or(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
        self
    }

    fn meets(self, other: Self) -> bool {
        self.0.iter().zip(other.0).any(|(a, b)| a & b != 0)
    }

    fn highest(self) -> Option<usize> {
        (0..256).rev().find(|r| self.0[r / 64] >> (r % 64) & 1 == 1)
    }
}

/// What the checks know of an instruction, beside the registers that it names.
#[derive(Clone, Copy, Debug)]
enum Effect {
    None,
    /// A wgmma, the last of its group or not.
    Product {
        sums: Registers,
        a: Registers,
        last: bool,
    },
    /// Until at most so many groups are under way.
    Wait(usize),
    /// So many registers a thread from here on.
    Budget(usize),
}

/// Where a warp goes from an instruction; places are indices of instructions.
#[derive(Clone, Debug)]
enum Next {
    On,
    To(usize),
    OnOrTo(usize),
    /// One of these.
    Switch(Vec<usize>),
    Call(usize),
    Return,
    End,
    OnOrEnd,
}

#[derive(Debug)]
struct Instruction {
    text: String,
    touches: Registers,
    effect: Effect,
    next: Next,
}

/// The number behind `R`, where a word of `text` begins with it at `at`.
fn register(text: &str, at: usize) -> Option<(usize, &str)> {
    let bytes = text.as_bytes();
    let inside = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    let rest = text[at..].strip_prefix('R').filter(|_| !inside)?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    Some((rest[..digits].parse().ok()?, &rest[digits..]))
}

/// The registers that `operands` of `op` name. Of wide ones the text has the first.
fn named(op: &str, operands: &str) -> Registers {
    let part = |word: &str| op.split('.').any(|p| p == word);
    let count = match () {
        () if part("128") || part("4") => 4,
        () if part("64") || part("F64") || op.starts_with('D') => 2,
        () if op.starts_with("CS2R") && !part("32") => 2,
        () => 1,
    };
    let mut all = Registers::default();
    let last = operands.matches(',').count();
    let mut bracket = false;
    let mut comma = 0;
    for (at, c) in operands.char_indices() {
        match c {
            '[' => bracket = true,
            ']' => bracket = false,
            ',' => comma += 1,
            'R' => {
                let Some((first, rest)) = register(operands, at) else { continue };
                let pair = op.starts_with("IMAD.WIDE") && (comma == 0 || comma == last);
                let count = match bracket || pair {
                    true if pair || rest.starts_with(".64") => 2,
                    true => 1,
                    false => count,
                };
                all = all.or(Registers::range(first, count));
            }
            _ => {}
        }
    }
    all
}

/// The last number of a text, `0x` and hexadecimal digits.
fn hexadecimal(text: &str) -> usize {
    let digits = text.rsplit("0x").next().unwrap().trim();
    usize::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("no number ends `{text}`"))
}

/// A wgmma: `R24, gdesc[UR8], R24, gsb0`, where A is in registers `R24, R4, gdesc[UR8], R24`.
fn product(op: &str, operands: &str) -> Effect {
    let columns: usize =
        op.strip_prefix("HGMMA.64x").unwrap().split('x').next().unwrap().parse().unwrap();
    let mut words = operands.split(',').map(str::trim);
    let mut four_or_sums = |count| match words.next().and_then(|word| register(word, 0)) {
        Some((first, _)) => Registers::range(first, count),
        None => Registers::default(),
    };
    let (sums, a) = (four_or_sums(columns / 2), four_or_sums(4));
    Effect::Product { sums, a, last: operands.contains("gsb0") }
}

/// The instructions of a kernel in nvdisasm's listing.
fn parse(listing: &str) -> Vec<Instruction> {
    let (mut lines, mut places) = (Vec::new(), HashMap::new());
    for line in listing.lines() {
        if let Some(label) = line.strip_suffix(':') {
            places.insert(label, lines.len());
        } else if let Some((_, rest)) = line.split_once("*/")
            && let Some(text) = rest.trim_end().strip_suffix(';')
        {
            lines.push(text.trim());
        }
    }
    let instruction = |text: &&str| {
        let guarded = text.starts_with('@');
        let bare = if guarded { text.split_once(' ').unwrap().1.trim() } else { text };
        let (op, operands) = bare.split_once(' ').unwrap_or((bare, ""));
        let target = || {
            let label = operands.split("`(").nth(1).and_then(|rest| rest.strip_suffix(')'));
            label
                .and_then(|l| places.get(l))
                .copied()
                .unwrap_or_else(|| panic!("where is `{text}`"))
        };
        let next = match op {
            "BRA" if !guarded && !operands.contains(',') => Next::To(target()),
            _ if op.starts_with("BRA") => Next::OnOrTo(target()),
            "BRX" | "BRXU" if !guarded => {
                let list = operands.split("BRANCH_TARGETS ").nth(1).expect("targets of BRX");
                let labels = list.split('"').next().unwrap().split(',');
                Next::Switch(labels.map(|label| places[label.trim()]).collect())
            }
            "CALL.REL.NOINC" if !guarded => Next::Call(target()),
            "RET.REL.NODEC" if !guarded => Next::Return,
            "EXIT" if guarded => Next::OnOrEnd,
            "EXIT" => Next::End,
            _ => {
                let others = ["BRX", "JMP", "JMX", "CALL", "RET"];
                let known = !others.iter().any(|other| op.starts_with(other));
                assert!(known, "where does a warp go from `{text}`?");
                Next::On
            }
        };
        let effect = match op {
            _ if op.starts_with("HGMMA.64x") => product(op, operands),
            "WARPGROUP.DEPBAR.LE" => Effect::Wait(hexadecimal(operands)),
            _ if op.starts_with("USETMAXREG") => Effect::Budget(hexadecimal(operands)),
            _ => Effect::None,
        };
        Instruction { text: (*text).to_owned(), touches: named(op, operands), effect, next }
    };
    lines.iter().map(instruction).collect()
}

/// Goes every way from instruction `from` on, each place once in each state; `visit` changes the
/// state, or ends the way by `false`.
fn walk<'a, S: Clone + Eq + Hash>(
    code: &'a [Instruction],
    from: usize,
    state: S,
    mut visit: impl FnMut(&'a Instruction, &mut S) -> bool,
) {
    let mut seen = HashSet::new();
    let mut ahead = vec![(from, Vec::<usize>::new(), state)];
    while let Some((at, calls, mut state)) = ahead.pop() {
        if at >= code.len() || !seen.insert((at, calls.clone(), state.clone())) {
            continue;
        }
        if !visit(&code[at], &mut state) {
            continue;
        }
        let mut go = |to, calls: &[usize]| ahead.push((to, calls.to_vec(), state.clone()));
        match &code[at].next {
            Next::On | Next::OnOrEnd => go(at + 1, &calls),
            Next::To(to) => go(*to, &calls),
            Next::Switch(all) => all.iter().for_each(|to| go(*to, &calls)),
            Next::OnOrTo(to) => {
                go(at + 1, &calls);
                go(*to, &calls);
            }
            Next::Call(to) => go(*to, &[&calls[..], &[at + 1]].concat()),
            Next::Return => {
                let (back, outer) = calls.split_last().expect("a return without a call");
                go(*back, outer);
            }
            Next::End => {}
        }
    }
}

/// The registers of a group of products.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Group {
    /// Of each chain of products.
    sums: Vec<Registers>,
    a: Registers,
}

/// The groups that no wait has covered, and what is not committed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct UnderWay {
    groups: Vec<Group>,
    open: Group,
}

/// Instructions that name a register of a product under way: they would see or spoil what the
/// tensor cores still use (PTX ISA, "wgmma.mma_async"). Products may go on with the very sums of
/// others. `waits` says for how many groups a wait leaves under way.
fn touched(code: &[Instruction], waits: impl Fn(usize) -> usize) -> Vec<&str> {
    let mut found = Vec::new();
    walk(code, 0, UnderWay::default(), |one, state| {
        let all = state.groups.iter().chain([&state.open]);
        let bad = all.into_iter().any(|Group { sums: chains, a: left }| match one.effect {
            Effect::Product { sums, a, .. } => {
                let mut others = chains.iter().filter(|other| **other != sums).chain([left]);
                others.any(|r| sums.meets(*r)) || chains.iter().any(|r| a.meets(*r))
            }
            _ => chains.iter().chain([left]).any(|r| one.touches.meets(*r)),
        });
        if bad && !found.contains(&one.text.as_str()) {
            found.push(one.text.as_str());
        }
        match one.effect {
            Effect::Product { sums, a, last } => {
                if !state.open.sums.contains(&sums) {
                    state.open.sums.push(sums);
                }
                state.open.a = state.open.a.or(a);
                if last {
                    state.groups.push(std::mem::take(&mut state.open));
                }
                // A loop without a wait is caught by what it touches; it need not be followed.
                state.groups.len() <= 6
            }
            Effect::Wait(left) => {
                let done = state.groups.len().saturating_sub(waits(left));
                state.groups.drain(..done);
                true
            }
            _ => true,
        }
    });
    found
}

/// The kernels of `kernels/*_sm90.cu`, name and code, for test `test`; none where nvcc's tools are
/// not there.
fn kernels(test: &str) -> Vec<(String, Vec<Instruction>)> {
    let Some(tool) = cuobjdump() else { return Vec::new() };
    let dir = temp_dir(test);
    let run = |command: &mut Command| {
        let done = command.current_dir(&dir).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let mut all = Vec::new();
    for (stem, ..) in sources().into_iter().filter(|(stem, ..)| scan::sm90(stem)) {
        let image = Path::new(env!("OUT_DIR")).join(format!("{stem}.fatbin"));
        run(Command::new(&tool).args(["-xelf", "all"]).arg(image));
        // It knows where an indirect branch goes.
        let disassembler = tool.with_file_name("nvdisasm");
        let text = run(Command::new(disassembler).arg("-c").arg(format!("{stem}.sm_90a.cubin")));
        all.extend(text.split("\n.text.").skip(1).map(|one| {
            let (name, code) = one.split_once(":\n").unwrap();
            (name.to_owned(), parse(code))
        }));
    }
    assert!(all.len() >= 30, "{} kernels for Hopper", all.len());
    all
}

#[test]
fn registers_of_a_product_under_way_are_left_alone() {
    for (name, code) in kernels("sass_under_way") {
        assert!(code.iter().any(|one| matches!(one.effect, Effect::Product { .. })), "{name}");
        assert_eq!(touched(&code, |left| left), [""; 0], "{name}");
        // The check has teeth: a wait that leaves one group more is found.
        assert!(!touched(&code, |left| left.max(1)).is_empty(), "{name} needs no wait for all");
        if name.starts_with("attention") {
            let weak = touched(&code, |left| if left == 1 { 2 } else { left });
            assert!(!weak.is_empty(), "{name} needs no wait for all but one");
        }
    }
}

/// The most registers that are used behind each `USETMAXREG`, and what it leaves.
fn budgets(code: &[Instruction]) -> Vec<(usize, usize)> {
    let behind = |(at, one): (usize, &Instruction)| {
        let Effect::Budget(budget) = one.effect else { return None };
        let mut used = 0;
        walk(code, at + 1, (), |one, ()| {
            let mut all = one.touches;
            if let Effect::Product { sums, a, .. } = one.effect {
                all = all.or(sums).or(a);
            }
            used = all.highest().map_or(used, |r| used.max(r + 1));
            !matches!(one.effect, Effect::Budget(_))
        });
        Some((used, budget))
    };
    code.iter().enumerate().filter_map(behind).collect()
}

#[test]
fn no_warpgroup_uses_registers_that_it_gave_away() {
    let mut some = 0;
    for (name, code) in kernels("sass_budgets") {
        let all = budgets(&code);
        for (used, budget) in &all {
            assert!(used <= budget, "{name} uses {used} registers of {budget}");
        }
        some += all.len();
        // The check has teeth: with the budgets of the other warpgroups one has too few.
        let (fewest, most) = (all.iter().map(|b| b.1).min(), all.iter().map(|b| b.0).max());
        assert!(fewest < most || all.is_empty(), "{name}: {all:?}");
    }
    assert!(some == 0 || some >= 40, "{some} moves of registers");
}

/// A product by columns of B takes whole lines of 64 columns: no kernel that ran on a GPU shows
/// what it makes of a part of a line. The widths of 80 and 96 are for `kernels/sim/maps_sm90.cu`.
#[test]
fn products_by_columns_take_whole_lines() {
    for (name, code) in kernels("sass_columns") {
        for one in code.iter().filter(|one| one.text.contains("tnspB")) {
            let Effect::Product { sums, .. } = one.effect else { panic!("{name}: {}", one.text) };
            let columns = 2 * sums.0.iter().map(|word| word.count_ones()).sum::<u32>();
            assert!(columns.is_multiple_of(64), "{name}: {}", one.text);
        }
    }
}

/// One kernel, as nvdisasm lists it, with a mistake of each kind in turn.
#[test]
fn mistakes_in_machine_code_are_found() {
    let code = |lines: &[&str]| {
        let line = |(i, text): (usize, &&str)| format!(".L{i}:\n        /*{i:04x}*/  {text} ;\n");
        parse(&lines.iter().enumerate().map(line).collect::<String>())
    };
    let good = [
        "MOV R4, R200",
        "WARPGROUP.ARRIVE",
        "HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT",
        "HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR8].tnspB, R8, gsb0",
        "@P0 BRA `(.L6)",
        "MOV R3, R16",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "STS.128 [R3], R8",
        "EXIT",
    ];
    assert_eq!(touched(&code(&good), |left| left), [""; 0]);
    for (at, mistake) in [
        (5, "MOV R3, R15"),
        (5, "MOV R4, R3"),
        (5, "LDG.E.64 R2, desc[UR8][R6.64]"),
        (5, "LDS.128 R5, [R16]"),
        (5, "IMAD.WIDE R16, R17, 0x4, R14"),
        (5, "STG.E.128 desc[UR8][R2.64], R12"),
        (5, "CALL.REL.NOINC `(.L7)"),
        (5, "HGMMA.64x8x16.F32.BF16 R12, gdesc[UR4], R12"),
        (5, "HGMMA.64x8x16.F32.BF16 R24, R12, gdesc[UR4], R24"),
        (5, "HGMMA.64x16x16.F32.BF16 R12, gdesc[UR4], R12"),
        (4, "@P0 BRA `(.L7)"),
        (4, "BRA.DIV UR4, `(.L7)"),
        (4, "BRX R20 -0x50 (*\"BRANCH_TARGETS .L6,.L7\"*)"),
        (3, "HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR8].tnspB, R8"),
        (6, "WARPGROUP.DEPBAR.LE gsb0, 0x1"),
    ] {
        let mut bad = good;
        bad[at] = mistake;
        assert!(!touched(&code(&bad), |left| left).is_empty(), "{mistake}");
    }
    let moves = [
        "@P0 BRA `(.L4)",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        "MOV R23, RZ",
        "EXIT",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
        "LDS.128 R236, [R1]",
        "EXIT",
    ];
    assert_eq!(budgets(&code(&moves)), [(24, 24), (240, 240)]);
}
