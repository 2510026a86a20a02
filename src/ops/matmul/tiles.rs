//! Which tile of `kernels/matmul.cu`, or on Hopper of `kernels/matmul_sm90.cu`, computes a product.
//! Tiles of one file differ in speed only: every sum is the same chain in all of them.

use crate::{
    device::{Arch, Cuda, cuda::Launch},
    error::Result,
};

/// A block's part of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128 x 128, 4 warps of 64 x 64; on Hopper 128 x 256 by two warpgroups
    Wide,
    /// 64 x 64, 4 warps of 32 x 32; on Hopper 128 x 128 by two warpgroups
    Mid,
    /// 64 x 32, 4 warps of 16 x 32; on Hopper 64 x 64
    Few,
    /// 16 x 32, 2 warps of 16 x 16; on Hopper 64 x 32
    Fewest,
}

/// What a tile costs, and what it is for.
#[derive(Debug)]
pub struct Choice {
    pub tile: Tile,
    pub sizes: (usize, usize),
    /// Blocks below each other that share what they read of the weights: a cluster.
    pub cluster: usize,
    /// Percent of the tensor cores' speed that its reads of shared memory leave.
    pub speed: usize,
    /// Bytes of shared memory, as in the kernel's file.
    pub shared: usize,
    pub why: &'static str,
    /// Where it loses, to which, and by what.
    pub loses: &'static str,
}

/// A generation of GPUs, as far as products are concerned.
#[derive(Debug)]
struct Family {
    /// Multiply-adds of a multiprocessor a clock.
    rate: usize,
    /// Bytes a clock that the L2 cache gives to all.
    l2: usize,
    /// A block a multiprocessor, which goes from tile to tile.
    persistent: bool,
    tiles: [Choice; 4],
}

/// Bytes a clock that one multiprocessor takes from the L2 cache.
const PORT: usize = 64;

/// Stages of `k` numbers of bf16 of a tile's rows and columns, or after them the sums.
const fn stages(count: usize, k: usize, (rows, cols): (usize, usize)) -> usize {
    let (operands, sums) = (count * k * (rows + cols) * 2, rows * cols * 4);
    if operands > sums { operands } else { sums }
}

/// Slots of 64 k with two barriers each, and `sent` rooms of 64 x 64 results in bf16.
const fn ring(count: usize, sent: usize, (rows, cols): (usize, usize)) -> usize {
    count * ((rows + cols) * 128 + 16) + sent * 8192
}

const AMPERE: Family = Family {
    rate: 1024,
    l2: 5120,
    persistent: false,
    tiles: [
        Choice {
            tile: Tile::Wide,
            sizes: (128, 128),
            cluster: 1,
            speed: 100,
            shared: stages(4, 32, (128, 128)),
            why: "most products: a warp reads 4 KiB of shared memory for 64 x 64 x 16 \
                  multiply-adds, half of what there is",
            loses: "to Mid where it leaves multiprocessors idle",
        },
        Choice {
            tile: Tile::Mid,
            sizes: (64, 64),
            cluster: 1,
            speed: 65,
            shared: stages(4, 32, (64, 64)),
            why: "hundreds of rows and few columns: four times as many tiles",
            loses: "to Wide: twice the shared memory and L2 traffic for each multiply-add",
        },
        Choice {
            tile: Tile::Few,
            sizes: (64, 32),
            cluster: 1,
            speed: 50,
            shared: stages(6, 64, (64, 32)),
            why: "17 to 64 rows: one tile holds all, so weights are read once",
            loses: "to Fewest: rows beyond 16 that are not there are multiplied",
        },
        Choice {
            tile: Tile::Fewest,
            sizes: (16, 32),
            cluster: 1,
            speed: 40,
            shared: stages(4, 128, (16, 32)),
            why: "up to 16 rows: every multiprocessor has weights on the way",
            loses: "to Few: every 16 rows would read the weights again, from L2",
        },
    ],
};

const HOPPER: Family = Family {
    rate: 2048,
    l2: 3700,
    persistent: true,
    tiles: [
        Choice {
            tile: Tile::Wide,
            sizes: (128, 256),
            cluster: 2,
            speed: 100,
            shared: ring(4, 4, (128, 256)),
            why: "most products: 80 of 128 bytes a clock of shared memory, and 32 a clock from L2, \
                  since the cluster brings the weights' part once",
            loses: "to Mid where it leaves multiprocessors idle",
        },
        Choice {
            tile: Tile::Mid,
            sizes: (128, 128),
            cluster: 2,
            speed: 90,
            shared: ring(6, 4, (128, 128)),
            why: "one or two thousand rows and few columns: twice as many tiles",
            loses: "to Wide: 48 bytes a clock from L2, more than it gives to all at once",
        },
        Choice {
            tile: Tile::Few,
            sizes: (64, 64),
            cluster: 1,
            speed: 70,
            shared: ring(8, 0, (64, 64)),
            why: "some dozens to hundreds of rows: as many bytes of rows as of weights",
            loses: "to Fewest where it leaves multiprocessors idle; to Mid from L2",
        },
        Choice {
            tile: Tile::Fewest,
            sizes: (64, 32),
            cluster: 1,
            speed: 50,
            shared: ring(12, 0, (64, 32)),
            why: "few rows: 112 blocks for 3584 columns, each with 44 KiB of weights on the way",
            loses: "to Few: for 64 rows, rows are read twice as often as weights",
        },
    ],
};

impl Family {
    const fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::Sm80 => &AMPERE,
            Arch::Sm90 => &HOPPER,
        }
    }

    fn choice(&self, tile: Tile) -> &Choice {
        &self.tiles[tile as usize]
    }

    /// Clocks for each 64 of k, as counted: the rounds that multiprocessors need for all tiles,
    /// each as long as it multiplies or as its operands come from L2, whichever is longer.
    fn clocks(&self, c: &Choice, processors: usize, m: usize, n: usize) -> usize {
        let (rows, cols) = c.sizes;
        let groups = m.div_ceil(rows * c.cluster).saturating_mul(n.div_ceil(cols));
        let places = (processors / c.cluster).max(1);
        let multiply = rows * cols * 64 * 100 / (self.rate * c.speed);
        let bytes = (m.min(rows) + cols / c.cluster) * 128;
        let blocks = groups.min(places) * c.cluster;
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

impl Tile {
    /// The one for a product of `m` x `n`.
    pub fn of(cuda: &Cuda, m: usize, n: usize) -> Self {
        Self::ranked(cuda.arch(), cuda.processors() as usize, m, n)[0].tile
    }

    /// As [`Tile::of`], for products that have no tiles for few rows.
    pub fn of_many(cuda: &Cuda, m: usize, n: usize) -> Self {
        let ranked = Self::ranked(cuda.arch(), cuda.processors() as usize, m, n);
        ranked
            .iter()
            .find(|c| matches!(c.tile, Self::Wide | Self::Mid))
            .map_or(Self::Mid, |c| c.tile)
    }

    /// All of them, the fastest first, on a GPU of `processors` multiprocessors. Nothing was
    /// measured on a GPU yet: this follows from counting.
    pub fn ranked(arch: Arch, processors: usize, m: usize, n: usize) -> [&'static Choice; 4] {
        let family = Family::of(arch);
        let mut all = family.tiles.each_ref();
        all.sort_by_key(|c| family.clocks(c, processors, m, n));
        all
    }

    /// Clocks that a product of `m` x `n` over `k` takes on a GPU of `processors` multiprocessors,
    /// as counted: what [`Tile::ranked`] goes by.
    pub fn clocks(self, arch: Arch, processors: usize, (m, n, k): (usize, usize, usize)) -> usize {
        let family = Family::of(arch);
        family.clocks(family.choice(self), processors, m, n).saturating_mul(k.div_ceil(64))
    }

    /// Rows and columns on Hopper.
    pub(super) fn hopper(self) -> (usize, usize) {
        HOPPER.choice(self).sizes
    }

    /// Blocks for the tiles of a product of `m` rows and `n` outputs, of which each takes a column,
    /// or two where they are `pairs`. On Hopper at most one a multiprocessor, which goes from tile
    /// to tile.
    pub fn launch(self, cuda: &Cuda, m: usize, n: usize, pairs: bool) -> Result<Launch> {
        let c = Family::of(cuda.arch()).choice(self);
        let ((rows, cols), cluster) = (c.sizes, c.cluster);
        let width = if pairs { cols / 2 } else { cols };
        let groups = m.div_ceil(rows * cluster).saturating_mul(n.div_ceil(width));
        let most = match Family::of(cuda.arch()).persistent {
            true => (cuda.processors() as usize / cluster).max(1),
            false => groups,
        };
        Launch::row(groups.min(most).saturating_mul(cluster), c.shared)
    }
}
