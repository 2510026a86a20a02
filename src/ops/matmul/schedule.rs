//! Which tile of `kernels/matmul.cu`, or on Hopper of `kernels/matmul_sm90.cu`, computes a product,
//! and on how many blocks. Tiles of one file differ in speed only: every sum is the same chain in
//! all of them.

use crate::{
    device::{Arch, Cuda, cuda::Launch},
    error::Result,
};

/// A block's part of a product, and what it costs.
#[derive(Debug)]
pub struct TileShape {
    /// Rows and columns, as in its kernels' names.
    pub size: [usize; 2],
    /// Blocks below each other that share what they read of the weights.
    pub cluster: usize,
    /// Percent of the tensor cores' speed that its reads of shared memory leave.
    speed: usize,
    /// Bytes of shared memory, as in the kernel's file.
    shared: usize,
}

/// The tiles of an architecture, and what its multiprocessors do in a clock.
#[derive(Debug)]
struct TileTable {
    /// Multiply-adds of a multiprocessor.
    rate: usize,
    /// Bytes that the L2 cache gives to all.
    l2: usize,
    /// A block a multiprocessor, which goes from tile to tile.
    persistent: bool,
    /// The first two have kernels for the backward pass.
    tiles: [TileShape; 4],
}

/// Bytes a clock that one multiprocessor takes from the L2 cache.
const PORT: usize = 64;

/// Stages of `k` numbers of bf16 of a tile's rows and columns, or after them the sums.
const fn stages(count: usize, k: usize, [rows, cols]: [usize; 2]) -> usize {
    let (operands, sums) = (count * k * (rows + cols) * 2, rows * cols * 4);
    if operands > sums { operands } else { sums }
}

/// Stages of 64 k with two barriers each, and `sent` buffers of 64 x 64 results in bf16.
const fn ring(count: usize, sent: usize, [rows, cols]: [usize; 2]) -> usize {
    count * ((rows + cols) * 128 + 16) + sent * 8192
}

const fn sm80(size: [usize; 2], speed: usize, count: usize, k: usize) -> TileShape {
    TileShape { size, cluster: 1, speed, shared: stages(count, k, size) }
}

const fn sm90(
    size: [usize; 2],
    cluster: usize,
    speed: usize,
    count: usize,
    sent: usize,
) -> TileShape {
    TileShape { size, cluster, speed, shared: ring(count, sent, size) }
}

const SM80: TileTable = TileTable {
    rate: 1024,
    l2: 5120,
    persistent: false,
    tiles: [
        // Most products: a warp reads 4 KiB of shared memory for 64 x 64 x 16 multiply-adds, half
        // of what there is. Loses to 64x64 where it leaves multiprocessors idle.
        sm80([128, 128], 100, 4, 32),
        // Hundreds of rows and few columns: four times as many tiles. Loses to 128x128: twice the
        // shared memory and L2 traffic for each multiply-add.
        sm80([64, 64], 65, 4, 32),
        // 17 to 64 rows: one tile holds all, so weights are read once. Loses to 16x32: rows beyond
        // 16 that are not there are multiplied.
        sm80([64, 32], 50, 6, 64),
        // Up to 16 rows: every multiprocessor has weights on the way. Loses to 64x32: every 16 rows
        // would read the weights again, from L2.
        sm80([16, 32], 40, 4, 128),
    ],
};

const SM90: TileTable = TileTable {
    rate: 2048,
    l2: 3700,
    persistent: true,
    tiles: [
        // Most products: 80 of 128 bytes a clock of shared memory, and 32 a clock from L2, since
        // the cluster reads the weights' part once. Loses to 128x128 where it leaves
        // multiprocessors idle.
        sm90([128, 256], 2, 100, 4, 4),
        // One or two thousand rows and few columns: twice as many tiles. Loses to 128x256: 48 bytes
        // a clock from L2, more than it gives to all at once.
        sm90([128, 128], 2, 90, 6, 4),
        // Some dozens to hundreds of rows: as many bytes of rows as of weights. Loses to 64x32
        // where it leaves multiprocessors idle, to 128x128 from L2.
        sm90([64, 64], 1, 70, 8, 0),
        // Few rows: 112 blocks for 3584 columns, each with 44 KiB of weights on the way. Loses to
        // 64x64: for 64 rows, rows are read twice as often as weights.
        sm90([64, 32], 1, 50, 12, 0),
    ],
};

impl TileTable {
    const fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::Sm80 => &SM80,
            Arch::Sm90 => &SM90,
        }
    }

    /// Clocks for each 64 of k, as counted: the rounds that multiprocessors need for all tiles,
    /// each as long as it multiplies or as its operands come from L2, whichever is longer.
    fn clocks(&self, tile: &TileShape, processors: usize, m: usize, n: usize) -> usize {
        let [rows, cols] = tile.size;
        let groups = m.div_ceil(rows * tile.cluster).saturating_mul(n.div_ceil(cols));
        let places = (processors / tile.cluster).max(1);
        let multiply = rows * cols * 64 * 100 / (self.rate * tile.speed);
        let bytes = (m.min(rows) + cols / tile.cluster) * 128;
        let blocks = groups.min(places) * tile.cluster;
        let read = bytes / PORT.min(self.l2 / blocks.max(1)).max(1);
        // In percent. Where several blocks share a multiprocessor, a few more than fit do not take
        // another round.
        let rounds = match self.persistent {
            true => groups.div_ceil(places).saturating_mul(100),
            false => (groups.saturating_mul(100) / places).max(100),
        };
        rounds.saturating_mul(multiply.max(read)) / 100
    }
}

impl TileShape {
    /// All of an architecture; the first two have kernels for the backward pass.
    pub fn all(arch: Arch) -> &'static [Self; 4] {
        &TileTable::of(arch).tiles
    }

    /// The one for a product of `m` x `n`.
    pub fn of(cuda: &Cuda, m: usize, n: usize) -> &'static Self {
        Self::ranked(cuda.arch(), cuda.processors() as usize, m, n)[0]
    }

    /// The one for a gradient of `m` x `n`.
    pub fn of_backward(cuda: &Cuda, m: usize, n: usize) -> &'static Self {
        let (table, processors) = (TileTable::of(cuda.arch()), cuda.processors() as usize);
        let [first, second, ..] = &table.tiles;
        let clocks = |tile| table.clocks(tile, processors, m, n);
        if clocks(first) <= clocks(second) { first } else { second }
    }

    /// All of them, the fastest first, on a GPU of `processors` multiprocessors. Nothing was
    /// measured on a GPU yet: this follows from counting.
    pub fn ranked(arch: Arch, processors: usize, m: usize, n: usize) -> [&'static Self; 4] {
        let table = TileTable::of(arch);
        let mut all = table.tiles.each_ref();
        all.sort_by_key(|tile| table.clocks(tile, processors, m, n));
        all
    }

    /// Clocks that a product of `m` x `n` over `k` takes on a GPU of `processors` multiprocessors,
    /// as counted: what [`TileShape::ranked`] goes by.
    pub fn clocks(&self, arch: Arch, processors: usize, [m, n, k]: [usize; 3]) -> usize {
        TileTable::of(arch).clocks(self, processors, m, n).saturating_mul(k.div_ceil(64))
    }

    /// `blocks` blocks with its shared memory.
    pub(in crate::ops) fn row(&self, blocks: usize) -> Result<Launch> {
        Launch::row(blocks, self.shared)
    }

    /// Blocks for the tiles of a product of `m` rows and `n` outputs, of which each takes a column,
    /// or two where they are `pairs`. On Hopper at most one a multiprocessor, which goes from tile
    /// to tile.
    pub fn launch(&self, cuda: &Cuda, m: usize, n: usize, pairs: bool) -> Result<Launch> {
        let ([rows, cols], cluster) = (self.size, self.cluster);
        let width = if pairs { cols / 2 } else { cols };
        let groups = m.div_ceil(rows * cluster).saturating_mul(n.div_ceil(width));
        let most = match TileTable::of(cuda.arch()).persistent {
            true => (cuda.processors() as usize / cluster).max(1),
            false => groups,
        };
        Launch::row(groups.min(most).saturating_mul(cluster), self.shared)
    }
}
