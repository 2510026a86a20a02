//! Which tile of `kernels/matmul.cu`, or on Hopper of `kernels/matmul_sm90.cu`, computes a product. Tiles of
//! one file differ in speed only: every sum is the same chain in all of them.

use crate::{
    device::{Cuda, cuda::Launch},
    error::Result,
};

/// A block's part of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128 x 128, 4 warps of 64 x 64; on Hopper 128 x 256 by two warpgroups, in clusters of two blocks
    Wide,
    /// 64 x 64, 4 warps of 32 x 32; on Hopper 128 x 128 by two warpgroups
    Mid,
    /// 64 x 32, 4 warps of 16 x 32; on Hopper 64 x 64
    Few,
    /// 16 x 32, 2 warps of 16 x 16; on Hopper 64 x 32
    Fewest,
}

/// A class of products, the tile for it, and why.
#[derive(Debug)]
pub struct Choice {
    /// Up to this many rows of the product.
    pub rows: usize,
    /// At least so many [`Tile::Wide`] a multiprocessor, in tenths.
    pub tenths: usize,
    /// What it is computed with.
    pub tile: Tile,
    /// The reason.
    pub why: &'static str,
    /// The next best, and what it lacks.
    pub loser: &'static str,
}

/// The first line that fits is taken. No line was measured on a GPU yet: they follow from counting.
pub const TABLE: [Choice; 4] = [
    Choice {
        rows: 16,
        tenths: 0,
        tile: Tile::Fewest,
        why: "decoding reads the weights once, and that is all its time: 32 columns a block give \
              112 blocks for n = 3584, each with 24 KiB and more of weights on the way",
        loser: "Few: half as many blocks, or 48 rows that are multiplied for nothing",
    },
    Choice {
        rows: 64,
        tenths: 0,
        tile: Tile::Few,
        why: "as above, but every block reads all rows, from L2: on Hopper 64 columns for 64 rows \
              keep that to what the weights take",
        loser: "Fewest: rows would be read twice as often, or weights once for every 16 rows",
    },
    Choice {
        rows: usize::MAX,
        tenths: 9,
        tile: Tile::Wide,
        why: "shared memory limits: a warp reads 4 KiB for 64 x 64 x 16 multiply-adds, 64 bytes a \
              clock on sm_80; on Hopper 80 of 128 bytes a clock, and a cluster reads 64 KiB from \
              L2 for 256 x 256 x 64",
        loser: "Mid: 1.3 to 2 times the shared memory and L2 traffic for each multiply-add",
    },
    Choice {
        rows: usize::MAX,
        tenths: 0,
        tile: Tile::Mid,
        why: "too few wide tiles for all multiprocessors",
        loser: "Wide: most would be idle (n = 896, m = 1024: 56 tiles of 128 x 128 for 132)",
    },
];

/// Of `kernels/matmul.cu` or `kernels/matmul_sm90.cu`; in bytes where not said otherwise.
struct Sizes {
    rows: usize,
    cols: usize,
    shared: usize,
    /// Blocks that work together.
    cluster: usize,
}

impl Tile {
    /// The one for a product of `m` x `n`.
    #[must_use]
    pub fn of(cuda: &Cuda, m: usize, n: usize) -> Self {
        Self::on(cuda.hopper(), cuda.processors() as usize, m, n)
    }

    /// As [`Tile::of`], for products that have no tiles for few rows.
    #[must_use]
    pub fn of_many(cuda: &Cuda, m: usize, n: usize) -> Self {
        Self::of(cuda, m.max(TABLE[1].rows + 1), n)
    }

    /// The one on a GPU of `processors` multiprocessors.
    #[must_use]
    pub fn on(hopper: bool, processors: usize, m: usize, n: usize) -> Self {
        let wide = Self::Wide.sizes(hopper);
        let count = m.div_ceil(wide.rows).saturating_mul(n.div_ceil(wide.cols));
        let enough = |c: &Choice| count.saturating_mul(10) >= c.tenths * processors;
        TABLE.iter().find(|c| m <= c.rows && enough(c)).map_or(Self::Mid, |c| c.tile)
    }

    fn sizes(self, hopper: bool) -> Sizes {
        if hopper {
            // Stages of 64 k with two barriers each, and what two warpgroups send: 64 x 64 in bf16, twice.
            let (rows, cols, stages, sent, cluster) = match self {
                Self::Wide => (128, 256, 4, 4, 2),
                Self::Mid => (128, 128, 6, 4, 1),
                Self::Few => (64, 64, 8, 0, 1),
                Self::Fewest => (64, 32, 12, 0, 1),
            };
            let shared = stages * ((rows + cols) * 128 + 16) + sent * 8192;
            return Sizes { rows, cols, shared, cluster };
        }
        let (rows, cols, depth, stages) = match self {
            Self::Wide => (128, 128, 32, 4),
            Self::Mid => (64, 64, 32, 4),
            Self::Few => (64, 32, 64, 6),
            Self::Fewest => (16, 32, 128, 4),
        };
        // The stages, and after them the sums.
        let shared = (stages * depth * (rows + cols) * 2).max(rows * cols * 4);
        Sizes { rows, cols, shared, cluster: 1 }
    }

    /// Rows and columns on Hopper.
    pub(super) fn hopper(self) -> (usize, usize) {
        let sizes = self.sizes(true);
        (sizes.rows, sizes.cols)
    }

    /// Blocks for the tiles of a product of `m` rows and `n` outputs, of which each takes a column, or two where
    /// they are `pairs`. On Hopper at most one a multiprocessor, which goes from tile to tile.
    ///
    /// # Errors
    /// [`crate::Error::Value`] if that is more than a grid holds.
    pub fn launch(self, cuda: &Cuda, m: usize, n: usize, pairs: bool) -> Result<Launch> {
        let Sizes { rows, cols, shared, cluster } = self.sizes(cuda.hopper());
        let width = if pairs { cols / 2 } else { cols };
        let groups = m.div_ceil(rows * cluster).saturating_mul(n.div_ceil(width));
        let most = match cuda.hopper() {
            true => (cuda.processors() as usize / cluster).max(1),
            false => groups,
        };
        Launch::row(groups.min(most).saturating_mul(cluster), shared)
    }
}
