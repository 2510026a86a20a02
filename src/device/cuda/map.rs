//! Tensor maps: what TMA needs to know of a tensor to copy boxes of it.

use std::{marker::PhantomData, ptr::NonNull};

use bytemuck::{Pod, Zeroable};

use super::{Cuda, PACKET, device_error};
use crate::{
    device::{
        float::Element,
        view::{View, ViewMut},
    },
    error::{Error, Result},
};

/// The most elements of a box in a dimension.
const MOST: usize = 256;

/// What the hardware keeps the size of a dimension and a stride in bytes below.
const SIZE: usize = 1 << 32;
const STRIDE: usize = 1 << 40;

/// How the 16-byte packets of a box are spread over the banks of shared memory: packets of a line
/// of so many bytes are permuted, each 128 bytes in their own way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    /// Lines of 32 bytes.
    Bytes32,
    /// Lines of 64 bytes.
    Bytes64,
    /// Lines of 128 bytes, as wgmma reads them.
    Bytes128,
}

/// How a tensor of 2 to 4 dimensions lies in memory and in which boxes it is copied. All are in
/// elements, the innermost dimension first.
#[derive(Clone, Copy, Debug)]
pub struct Tiles<const N: usize> {
    /// Size in each dimension; what a box has beyond reads as 0 and is not written.
    pub dims: [usize; N],
    /// From one to the next in each dimension; 1 in the innermost.
    pub strides: [usize; N],
    /// Size of a box.
    pub tile: [usize; N],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
}

impl Tiles<2> {
    /// Boxes of `tile` rows and columns, in this order, of the matrix `[rows, cols]` whose rows
    /// begin `stride` elements apart.
    pub fn of_matrix(
        [rows, cols]: [usize; 2],
        stride: usize,
        tile: [usize; 2],
        swizzle: Swizzle,
    ) -> Self {
        Self { dims: [cols, rows], strides: [1, stride], tile: [tile[1], tile[0]], swizzle }
    }
}

/// The tensor map of a view, an argument of a kernel.
#[derive(Debug)]
pub struct Map<'a> {
    pub(super) words: Words,
    _memory: PhantomData<&'a mut [u8]>,
}

impl Map<'_> {
    /// The 128 bytes that a kernel gets.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.words)
    }
}

/// An argument of a kernel: a tensor map, or less and zeros.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Words(pub [u64; 16]);

/// A tensor that was checked. These very bytes are the simulator's tensor map.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Tensor {
    pub base: u64,
    pub element_bytes: u32,
    /// Dimensions; those that are not there have size 1.
    pub rank: u32,
    pub dims: [u64; 4],
    pub strides: [u64; 4],
    pub tile: [u32; 4],
    /// Bytes of a line, 0 without.
    pub swizzle: u32,
    unused: [u32; 7],
}

impl Tensor {
    pub(super) fn words(&self) -> Words {
        Words(bytemuck::cast(*self))
    }

    fn of<T: Element, const N: usize>(at: NonNull<u8>, len: usize, t: &Tiles<N>) -> Result<Self> {
        const { assert!(N >= 2 && N <= 4 && size_of::<Self>() == size_of::<Words>()) };
        let want = |ok: bool, what: &str, want: String, got: usize| {
            if ok { Ok(()) } else { Err(Error::value(format!("tensor map: {what}"), want, got)) }
        };
        let width = size_of::<T>();
        if !matches!(T::NAME, "BF16" | "F32") {
            return Err(device_error(format!("there is no tensor map of {}", T::NAME)));
        }
        let packets = format!("a multiple of {PACKET}");
        let begin = at.addr().get();
        want(begin.is_multiple_of(PACKET), "address of the view", packets.clone(), begin)?;
        want(t.strides[0] == 1, "stride of dimension 0", "1".into(), t.strides[0])?;
        let mut end = 1usize;
        let mut tensor = Self {
            base: begin as u64,
            element_bytes: width as u32,
            rank: N as u32,
            dims: [1; 4],
            tile: [1; 4],
            ..Self::zeroed()
        };
        for i in 0..N {
            let of = |what: &str| format!("{what} of dimension {i}");
            let (dim, stride, tile) = (t.dims[i], t.strides[i], t.tile[i]);
            let size = format!("1 to {SIZE}");
            want((1..=SIZE).contains(&dim), &of("size"), size, dim)?;
            let size = format!("1 to {MOST} elements");
            want((1..=MOST).contains(&tile), &of("box"), size, tile)?;
            let bytes = stride.saturating_mul(width);
            let whole = bytes.is_multiple_of(PACKET) && bytes < STRIDE;
            let stride_wanted = format!("{packets}, below {STRIDE}");
            want(i == 0 || whole, &of("bytes between neighbours"), stride_wanted, bytes)?;
            end = end.saturating_add((dim - 1).saturating_mul(stride));
            (tensor.dims[i], tensor.strides[i]) = (dim as u64, bytes as u64);
            tensor.tile[i] = tile as u32;
        }
        let inner = t.tile[0] * width;
        want(inner.is_multiple_of(PACKET), "bytes of a box's row", packets, inner)?;
        let line = match t.swizzle {
            Swizzle::None => MOST * width,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        };
        let narrow = format!("at most {line} with this swizzle");
        want(inner <= line, "bytes of a box's row", narrow, inner)?;
        want(len >= end, "elements of the view", format!("{end} or more"), len)?;
        tensor.swizzle = if t.swizzle == Swizzle::None { 0 } else { line as u32 };
        Ok(tensor)
    }
}

impl Cuda {
    /// The map of a tensor that a kernel reads.
    ///
    /// # Errors
    /// [`Error::Value`] naming what is wrong: the view or a stride is not whole packets of 16
    /// bytes, a box has more than 256 elements in a dimension or a row that is wider than the
    /// swizzle, or the view ends before the tensor; [`Error::Device`] if it is in host memory or
    /// the driver refuses it.
    pub fn map<'a, T: Element, const N: usize>(
        &self,
        view: View<'a, T>,
        tiles: Tiles<N>,
    ) -> Result<Map<'a>> {
        let len = view.len();
        self.map_at::<T, N>(view.device_ptr()?, len, &tiles)
    }

    /// The map of a tensor that a kernel writes.
    pub fn map_mut<'a, T: Element, const N: usize>(
        &self,
        view: ViewMut<'a, T>,
        tiles: Tiles<N>,
    ) -> Result<Map<'a>> {
        let len = view.len();
        self.map_at::<T, N>(view.device_ptr()?, len, &tiles)
    }

    /// The maps of two matrices that lie side by side in one, the second `apart` elements after the
    /// first.
    pub fn map_both<'a, T: Element>(
        &self,
        view: ViewMut<'a, T>,
        tiles: Tiles<2>,
        apart: usize,
    ) -> Result<[Map<'a>; 2]> {
        let (len, first) = (view.len(), view.device_ptr()?);
        let second = first.map_addr(|at| at.saturating_add(apart.saturating_mul(size_of::<T>())));
        let second = self.map_at::<T, 2>(second, len.saturating_sub(apart), &tiles)?;
        Ok([self.map_at::<T, 2>(first, len, &tiles)?, second])
    }

    fn map_at<'a, T: Element, const N: usize>(
        &self,
        at: NonNull<u8>,
        len: usize,
        tiles: &Tiles<N>,
    ) -> Result<Map<'a>> {
        let tensor = Tensor::of::<T, N>(at, len, tiles)?;
        Ok(Map { words: self.driver.enter()?.tensor_map(&tensor)?, _memory: PhantomData })
    }
}
