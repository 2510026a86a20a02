//! Matrix product micro-kernels: `C[m,n] (+)= A[m,k] B[k,n]` with B packed in panels of 32 columns.
//!
//! Each output is ONE chain of fused multiply-adds over k = 0, 1, 2, ..., starting from 0 or from
//! C. So the number of rows, the tile, the thread and the instruction set cannot change a bit, and
//! adding a second batch to C continues the very chain that one larger batch would have made.

#![allow(unsafe_code)]

mod grouped;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::mem::MaybeUninit;

use super::{super::Float, Cpu, Isa, simd::Level};

pub use grouped::products;

/// Columns of a panel: two 512-bit vectors of f32.
pub const NR: usize = 32;

/// Rows of k that one pass over A and C covers: a panel of 256 x 32 f32 is 32 KiB, one L1 cache.
const KC: usize = 256;

/// Rows of A that all panels pass over before the next: 264 x 256 f32 are 264 KiB, which stay in
/// L2.
const MC: usize = 264;

/// The left operand, row-major with leading dimension `ld`, or its transpose.
#[derive(Clone, Copy, Debug)]
pub struct Lhs<'a, F> {
    pub data: &'a [F],
    /// Distance between stored rows.
    pub ld: usize,
    /// false: A(i, k) = data[i * ld + k]; true: A(i, k) = data[k * ld + i].
    pub transposed: bool,
}

impl<'a, F> Lhs<'a, F> {
    /// A(i, k) = data[i * ld + k]
    pub fn rows(data: &'a [F], ld: usize) -> Self {
        Self { data, ld, transposed: false }
    }

    /// A(i, k) = data[k * ld + i]
    pub fn columns(data: &'a [F], ld: usize) -> Self {
        Self { data, ld, transposed: true }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Rhs<'a, F> {
    /// Panels as [`pack`] writes them: `[ceil(n / 32)][k][32]`.
    Packed(&'a [F]),
    /// B(k, j) = data[k * ld + j]
    Rows {
        data: &'a [F],
        /// Distance between stored rows.
        ld: usize,
    },
    /// B(k, j) = data[j * ld + k]: the transpose of a stored matrix.
    Columns {
        data: &'a [F],
        /// Distance between stored rows.
        ld: usize,
    },
}

/// Memory on the stack for a block of A and a panel of B: only what was written is read.
struct Room<F, const N: usize>(MaybeUninit<[F; N]>);

impl<F: Float, const N: usize> Room<F, N> {
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// `rows` rows of `width`, the first `from.len()` of each copied from `row(i)`, the others 0.
    fn fill<'a>(&mut self, rows: usize, width: usize, row: impl Fn(usize) -> &'a [F]) -> &[F] {
        assert!(rows * width <= N);
        let start = self.0.as_mut_ptr().cast::<F>();
        for i in 0..rows {
            let from = row(i);
            assert!(from.len() <= width);
            // SAFETY: row `i` is within the array.
            let to = unsafe { start.add(i * width) };
            // The common width as one block: a call for every 128 bytes would cost more.
            match <&[F; NR]>::try_from(from) {
                // SAFETY: row `i` has at least NR elements.
                Ok(block) => unsafe { to.cast::<[F; NR]>().write_unaligned(*block) },
                // SAFETY: `from` fits the row, and is not in this array.
                Err(_) => unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) },
            }
            // SAFETY: the end of `from`, at most that of the row.
            let rest = unsafe { to.add(from.len()) };
            // SAFETY: what is left of the row; all zeros is a value of F.
            unsafe { rest.write_bytes(0, width - from.len()) };
        }
        // SAFETY: all rows were just written.
        unsafe { std::slice::from_raw_parts(start, rows * width) }
    }

    /// The first `n` elements as zeros, to write.
    fn zeros(&mut self, n: usize) -> &mut [F] {
        assert!(n <= N);
        let start = self.0.as_mut_ptr().cast::<F>();
        // SAFETY: `n` elements fit the array; all zeros is a value of F.
        unsafe { start.write_bytes(0, n) };
        // SAFETY: just initialised, and borrowed exclusively through `self`.
        unsafe { std::slice::from_raw_parts_mut(start, n) }
    }
}

impl<'a, F: Float> Rhs<'a, F> {
    fn check(&self, k: usize, n: usize) {
        if k == 0 {
            return;
        }
        let (have, enough) = match *self {
            Self::Packed(panels) => (panels.len(), packed_len(k, n) <= panels.len()),
            Self::Rows { data, ld } => (data.len(), holds(data.len(), ld, (k, n))),
            Self::Columns { data, ld } => (data.len(), holds(data.len(), ld, (n, k))),
        };
        assert!(enough, "B [{k}, {n}] is too short: {have}");
    }

    /// Rows `k0..k0 + kc` of panel `p` as `[kc, 32]`, packed into `room` where it is not yet.
    fn panel<'r>(
        &self,
        p: usize,
        (k, n): (usize, usize),
        (k0, kc): (usize, usize),
        room: &'r mut Room<F, { KC * NR }>,
    ) -> &'r [F]
    where
        'a: 'r,
    {
        let (j, nc) = (p * NR, NR.min(n - p * NR));
        match *self {
            Self::Packed(panels) => &panels[(p * k + k0) * NR..][..kc * NR],
            Self::Rows { data, ld } => {
                let data = &data[k0 * ld + j..];
                room.fill(kc, NR, |i| &data[i * ld..i * ld + nc])
            }
            Self::Columns { data, ld } => {
                let room = room.zeros(kc * NR);
                pack_columns(room, &data[j * ld + k0..], ld, kc, nc);
                room
            }
        }
    }
}

/// Whether `len` elements hold `rows` rows of `cols`, `ld` apart. Sizes that overflow do not fit.
fn holds(len: usize, ld: usize, (rows, cols): (usize, usize)) -> bool {
    let before = rows.saturating_sub(1).checked_mul(ld);
    before.and_then(|n| n.checked_add(cols)).is_some_and(|n| n <= len)
}

/// Elements of B `[k, n]` in panels; `usize::MAX`, which no memory has, where that overflows.
pub const fn packed_len(k: usize, n: usize) -> usize {
    n.div_ceil(NR).saturating_mul(NR).saturating_mul(k)
}

/// Writes B = Wᵀ, W `[n, k]`, as panels `[ceil(n / 32)][k][32]`; columns beyond `n` are 0.
pub fn pack<F: Float>(cpu: &Cpu, panels: &mut [F], w: &[F], n: usize, k: usize) {
    assert_eq!((w.len(), panels.len()), (n * k, packed_len(k, n)));
    if k == 0 {
        return;
    }
    cpu.rows(n.div_ceil(NR), 4, (panels, k * NR), |range, out| {
        for (p, panel) in range.zip(out.chunks_exact_mut(k * NR)) {
            pack_columns(panel, &w[p * NR * k..], k, k, NR.min(n - p * NR));
        }
    });
}

/// Packs one panel `[k, 32]` of B = Wᵀ from `nc` rows of W `[.., k]` with leading dimension `ld`;
/// columns beyond `nc` are 0.
///
/// # Panics
/// If a slice is too short for the sizes.
pub fn pack_panel<F: Float>(panel: &mut [F], w: &[F], ld: usize, k: usize, nc: usize) {
    pack_columns(panel, w, ld, k, nc);
}

fn pack_columns<F: Float>(panel: &mut [F], w: &[F], ld: usize, k: usize, nc: usize) {
    if nc < NR {
        panel.fill(F::ZERO);
    }
    // Eight k at a time: reads stay in a cache line, writes in a few.
    for k0 in (0..k).step_by(8) {
        let k1 = (k0 + 8).min(k);
        for c in 0..nc {
            for (i, x) in w[c * ld + k0..c * ld + k1].iter().enumerate() {
                panel[(k0 + i) * NR + c] = *x;
            }
        }
    }
}

/// `C(i, j) (+)= sum_k A(i, k) B(k, j)`, where C is `[m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a, F> {
    /// m, n, k
    pub sizes: (usize, usize, usize),
    pub a: Lhs<'a, F>,
    pub b: Rhs<'a, F>,
    /// Continues the chain from C; without, it starts at 0.
    pub add: bool,
    /// `[n]`, added to the sums.
    pub bias: Option<&'a [F]>,
}

impl<'a, F> Product<'a, F> {
    pub fn new(sizes: (usize, usize, usize), a: Lhs<'a, F>, b: Rhs<'a, F>) -> Self {
        Self { sizes, a, b, add: false, bias: None }
    }

    pub fn continuing(self, add: bool) -> Self {
        Self { add, ..self }
    }
}

/// `C(i, j) = c[i * ldc + j]` on all threads.
///
/// # Panics
/// If a slice is too short for the sizes.
pub fn product<F: Float>(cpu: &Cpu, c: &mut [F], ldc: usize, product: Product<'_, F>) {
    check(c, ldc, &product);
    let Product { sizes: (m, n, k), a, b, .. } = product;
    let out = Out { c: c.as_mut_ptr(), ldc };
    let panels = n.div_ceil(NR);
    // A task below about 10^5 multiply-adds costs more to hand over than to run.
    let work = m.saturating_mul(n).saturating_mul(k);
    let want = if work < 100_000 { 1 } else { cpu.threads() * 4 };
    let (rows, per) = split((m, panels), want, a.copied(k), b, block_rows(a, b));
    let (tasks_m, tasks_n) = (m.div_ceil(rows), panels.div_ceil(per));
    cpu.run(tasks_n * tasks_m, |task| {
        let (tm, tn) = (task / tasks_n, task % tasks_n);
        let (i0, i1) = (tm * rows, ((tm + 1) * rows).min(m));
        let (p0, p1) = (tn * per, ((tn + 1) * per).min(panels));
        // SAFETY: `check` bounds C, A and B; tasks own disjoint rectangles of C.
        unsafe { block(cpu.isa(), &out, (i0, i1), (p0, p1), &product) };
    });
}

/// Rows and panels of each of about `want` tasks, so that the least is packed: a task packs its
/// part of B for every block of its rows, and copies its rows of A once for all its panels.
fn split<F>(
    (m, panels): (usize, usize),
    want: usize,
    copies: bool,
    b: Rhs<'_, F>,
    mc: usize,
) -> (usize, usize) {
    let packs = !matches!(b, Rhs::Packed(_));
    let sizes = (1..=want).map(|tasks_m| {
        let rows = m.div_ceil(tasks_m).next_multiple_of(12).max(48);
        let tasks_m = m.div_ceil(rows).max(1);
        let per = panels.div_ceil(want.div_ceil(tasks_m)).max(1);
        let tasks_n = panels.div_ceil(per);
        let cost_b = if packs { panels * NR * m.div_ceil(rows) * rows.div_ceil(mc) } else { 0 };
        let cost_a = if copies { m * tasks_n } else { 0 };
        // Else the squarest: it reads the least of both operands.
        (cost_a + cost_b, rows.max(per * NR), rows, per)
    });
    sizes.min().map_or((m.max(1), panels.max(1)), |best| (best.2, best.3))
}

/// Rows of A between two visits of a panel. Where B is packed on the way and A is not, packing less
/// often is worth reading A from L3.
fn block_rows<F>(a: Lhs<'_, F>, b: Rhs<'_, F>) -> usize {
    if a.transposed || matches!(b, Rhs::Packed(_)) { MC } else { 8 * MC }
}

/// [`product`] on this thread alone, for callers that are already parallel.
///
/// # Panics
/// If a slice is too short for the sizes.
pub fn serial<F: Float>(isa: Isa, c: &mut [F], ldc: usize, product: Product<'_, F>) {
    check(c, ldc, &product);
    let (m, n, _) = product.sizes;
    let out = Out { c: c.as_mut_ptr(), ldc };
    // SAFETY: `check` bounds C, A and B, and `c` is borrowed exclusively.
    unsafe { block(isa, &out, (0, m), (0, n.div_ceil(NR)), &product) };
}

fn check<F: Float>(c: &[F], ldc: usize, product: &Product<'_, F>) {
    let Product { sizes: (m, n, k), a, b, bias, .. } = *product;
    if m == 0 || n == 0 {
        return;
    }
    assert!(ldc >= n && holds(c.len(), ldc, (m, n)), "C [{m}, {n}] is too short: {}", c.len());
    let (outer, inner) = if a.transposed { (k, m) } else { (m, k) };
    assert!(
        k == 0 || (a.ld >= inner && holds(a.data.len(), a.ld, (outer, inner))),
        "A [{m}, {k}] is too short: {}",
        a.data.len()
    );
    b.check(k, n);
    assert!(bias.is_none_or(|bias| bias.len() == n), "bias must have {n} elements");
}

/// Where tasks write: each its own rectangle.
struct Out<F> {
    c: *mut F,
    ldc: usize,
}

// SAFETY: tasks write disjoint rectangles.
unsafe impl<F: Send> Sync for Out<F> {}

/// Rows `i0..i1` and panels `p0..p1` of C.
///
/// # Safety
/// [`check`] passed, and nobody else touches that rectangle.
unsafe fn block<F: Float>(
    isa: Isa,
    out: &Out<F>,
    (i0, i1): (usize, usize),
    (p0, p1): (usize, usize),
    product: &Product<'_, F>,
) {
    let Product { sizes: (_, n, k), a, b, add, bias } = *product;
    let m = i1 - i0;
    if m == 0 || n == 0 {
        return;
    }
    let (mut room_a, mut room_b) = (Room::new(), Room::new());
    let mc = block_rows(a, b);
    // A block of A stays in L2 while all panels pass over it, a panel of B in L1 while all tiles
    // of the block do; where A is copied, half as deep, to leave room for the copy.
    let depth = if a.copied(k) { KC / 2 } else { KC };
    for k0 in (0..k.max(1)).step_by(depth) {
        let kc = depth.min(k - k0);
        for i in (i0..i1).step_by(mc) {
            let rows = mc.min(i1 - i);
            let (data, lda) = a.block((i, rows), (k0, kc), &mut room_a);
            for p in p0..p1 {
                let nc = NR.min(n - p * NR);
                let panel =
                    if k == 0 { &[][..] } else { b.panel(p, (k, n), (k0, kc), &mut room_b) };
                let tile = Tile {
                    a: data.as_ptr(),
                    lda,
                    transposed: a.transposed,
                    b: panel.as_ptr(),
                    k: kc,
                    add: add || k0 > 0,
                };
                // SAFETY: row i and column 32 p are inside C.
                let c = unsafe { out.c.add(i * out.ldc + p * NR) };
                // SAFETY: `check` bounds every access of `rows` rows, `nc` columns, `kc` steps.
                unsafe { run(isa, tile, rows, nc, c, out.ldc) };
                let Some(bias) = bias.filter(|_| k0 + depth >= k) else { continue };
                for r in 0..rows {
                    // SAFETY: row `i + r` of C has `nc` columns from 32 p on.
                    let row = unsafe { c.add(r * out.ldc) };
                    // SAFETY: as above, and the rectangle is this task's own.
                    let row = unsafe { std::slice::from_raw_parts_mut(row, nc) };
                    for (y, b) in row.iter_mut().zip(&bias[p * NR..]) {
                        *y += *b;
                    }
                }
            }
        }
    }
}

impl<'a, F: Float> Lhs<'a, F> {
    /// Whether [`Lhs::block`] copies: a transposed operand with long rows, whose columns would all
    /// fall into a few sets of the cache.
    fn copied(&self, k: usize) -> bool {
        self.transposed && self.ld > 4 * NR && k >= NR
    }

    /// `rows` rows from `i` and `kc` columns from `k`, and their leading dimension.
    fn block<'r>(
        &self,
        (i, rows): (usize, usize),
        (k, kc): (usize, usize),
        room: &'r mut Room<F, { KC / 2 * MC }>,
    ) -> (&'r [F], usize)
    where
        'a: 'r,
    {
        let skip = if self.transposed { k * self.ld + i } else { i * self.ld + k };
        let data = &self.data[skip.min(self.data.len())..];
        if !self.copied(kc) {
            return (data, self.ld);
        }
        (room.fill(kc, rows, |k| &data[k * self.ld..k * self.ld + rows]), rows)
    }
}

/// Pointers of one pass, bounds checked by `check`.
#[derive(Clone, Copy, Debug)]
struct Tile<F> {
    a: *const F,
    lda: usize,
    transposed: bool,
    b: *const F,
    k: usize,
    add: bool,
}

impl<F> Tile<F> {
    fn cast<G>(self) -> Tile<G> {
        let Self { a, lda, transposed, b, k, add } = self;
        Tile { a: a.cast(), lda, transposed, b: b.cast(), k, add }
    }
}

/// Runs the micro-kernel for this type and instruction set.
///
/// # Safety
/// `tile` and `c` must cover `m` rows of `nc <= 32` columns.
unsafe fn run<F: Float>(isa: Isa, tile: Tile<F>, m: usize, nc: usize, c: *mut F, ldc: usize) {
    if F::NAME == "F32" {
        // SAFETY: the caller's promise; this is f32.
        unsafe { run_f32(isa, tile.cast(), m, nc, c.cast(), ldc) }
    } else {
        // SAFETY: the caller's promise; there is no other float than f64.
        unsafe { run_f64(isa, tile.cast(), m, nc, c.cast(), ldc) }
    }
}

/// Runs `$kernel::<R, T>` over all rows, `$mr` at a time.
macro_rules! sweep {
    ($kernel:ident, [$($r:literal)+], $mr:literal, $tile:expr, $m:expr, $nc:expr, $c:expr, $ldc:expr) => {{
        let (tile, m) = ($tile, $m);
        let mut i = 0;
        while i < m {
            let rows = (m - i).min($mr);
            let step = if tile.transposed { i } else { i * tile.lda };
            // SAFETY: row `i` is below `m`, which the caller bounded.
            let tile = Tile { a: unsafe { tile.a.add(step) }, ..tile };
            // SAFETY: as above.
            let c = unsafe { $c.add(i * $ldc) };
            match (rows, tile.transposed) {
                $(
                    // SAFETY: `rows` rows from here are inside the caller's bounds.
                    ($r, false) => unsafe { $kernel::<$r, false>(tile, $nc, c, $ldc) },
                    // SAFETY: as above.
                    ($r, true) => unsafe { $kernel::<$r, true>(tile, $nc, c, $ldc) },
                )+
                _ => unreachable!(),
            }
            i += rows;
        }
    }};
}

/// # Safety
/// As [`run`].
unsafe fn run_f32(isa: Isa, tile: Tile<f32>, m: usize, nc: usize, c: *mut f32, ldc: usize) {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => {
            use x86::avx512;
            sweep!(avx512, [1 2 3 4 5 6 7 8 9 10 11 12], 12, tile, m, nc, c, ldc);
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            use x86::avx2;
            sweep!(avx2, [1 2 3 4 5 6], 6, tile, m, nc, c, ldc);
        }
        _ => sweep!(portable32, [1 2 3 4], 4, tile, m, nc, c, ldc),
    }
}

/// # Safety
/// As [`run`].
unsafe fn run_f64(isa: Isa, tile: Tile<f64>, m: usize, nc: usize, c: *mut f64, ldc: usize) {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx2 => {
            use x86::wide;
            sweep!(wide, [1 2 3 4], 4, tile, m, nc, c, ldc);
        }
        _ => sweep!(portable64, [1 2 3 4], 4, tile, m, nc, c, ldc),
    }
}

/// R rows x 32 columns in plain Rust: the definition of what the others compute.
///
/// # Safety
/// As [`run`], for R rows.
#[inline(always)]
#[allow(clippy::multiple_unsafe_ops_per_block)]
unsafe fn portable<const R: usize, const T: bool, F: Float>(
    t: Tile<F>,
    nc: usize,
    c: *mut F,
    ldc: usize,
) {
    let mut acc = [[F::ZERO; NR]; R];
    // SAFETY: the caller bounds R rows of `nc` columns of C and of `t.k` steps of A and B.
    unsafe {
        if t.add {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate().take(nc) {
                    *acc = *c.add(r * ldc + j);
                }
            }
        }
        for k in 0..t.k {
            let b = &*t.b.add(k * NR).cast::<[F; NR]>();
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = *t.a.add(if T { k * t.lda + r } else { r * t.lda + k });
                for j in 0..NR {
                    acc[j] = a.mul_add(b[j], acc[j]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (j, acc) in acc.iter().enumerate().take(nc) {
                *c.add(r * ldc + j) = *acc;
            }
        }
    }
}

/// # Safety
/// As [`portable`].
unsafe fn portable32<const R: usize, const T: bool>(
    t: Tile<f32>,
    nc: usize,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { portable::<R, T, f32>(t, nc, c, ldc) }
}

/// # Safety
/// As [`portable`].
unsafe fn portable64<const R: usize, const T: bool>(
    t: Tile<f64>,
    nc: usize,
    c: *mut f64,
    ldc: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { portable::<R, T, f64>(t, nc, c, ldc) }
}
