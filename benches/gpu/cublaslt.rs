//! NVIDIA's cuBLASLt, where its library is installed: the yardstick of the product benches.

#![allow(unsafe_code)]

use std::{ffi::c_void, fmt};

use cudarc::cublaslt::sys;
use half::bf16;
use warpo::{
    Error, Result,
    device::{Buffer, Cuda, Device, Element, View, ViewMut},
};

/// What NVIDIA recommends on Hopper.
const WORKSPACE: usize = 32 << 20;

/// The most algorithms that are asked for.
const ALGORITHMS: usize = 32;

/// Bytes that every operand's address is a multiple of.
const PACKET: usize = 16;

/// Which product of a linear layer with weight `w` `[n, k]`, over `m` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// `y = x Wᵀ`: `x` `[m, k]`, `y` `[m, n]` bf16.
    Forward,
    /// `dx = dy W`: `dy` `[m, n]`, `dx` `[m, k]` bf16.
    BackwardInput,
    /// `dw = dyᵀ x`: `dy` `[m, n]`, `x` `[m, k]`, `dw` `[n, k]` f32.
    BackwardWeight,
}

/// A product, `2 m n k` FLOPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    pub of: Of,
    /// Rows of `x` and `y`.
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// A matrix as cuBLASLt sees it, by columns without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    /// Multiplied as its transpose.
    pub transposed: bool,
}

impl Product {
    /// The matrices A, B and D of cuBLASLt's `D = op(A) op(B)`. By columns a matrix is the
    /// transpose of what it is by rows, so D is the transpose of the product: A is its right
    /// operand and B its left one.
    pub fn by_columns(&self) -> [Matrix; 3] {
        let Self { of, m, n, k } = *self;
        let at = |rows, cols, transposed| Matrix { rows, cols, transposed };
        match of {
            Of::Forward => [at(k, n, true), at(k, m, false), at(n, m, false)],
            Of::BackwardInput => [at(k, n, false), at(n, m, false), at(k, m, false)],
            Of::BackwardWeight => [at(k, m, false), at(n, m, true), at(k, n, false)],
        }
    }
}

/// One of cuBLASLt's ways to compute a product.
#[derive(Clone, Copy, Debug)]
pub struct Algorithm {
    algo: sys::cublasLtMatmulAlgo_t,
    id: i32,
    tile: u32,
    stages: u32,
    /// Parts that the reduced axis is split into.
    split: i32,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, tile, stages, split, .. } = self;
        write!(f, "algorithm {id}, tile {tile}, stages {stages}, split {split}")
    }
}

impl Algorithm {
    fn of(found: &sys::cublasLtMatmulHeuristicResult_t) -> Result<Self> {
        use sys::cublasLtMatmulAlgoConfigAttributes_t as A;
        let get = |what| {
            let (mut value, mut written) = (0u32, 0);
            let at = (&raw mut value).cast();
            // SAFETY: the algorithm comes from the library; these attributes are numbers of 4
            // bytes.
            let status = unsafe {
                sys::cublasLtMatmulAlgoConfigGetAttribute(&found.algo, what, at, 4, &mut written)
            };
            check("an attribute of an algorithm", status).map(|()| value)
        };
        Ok(Self {
            algo: found.algo,
            id: get(A::CUBLASLT_ALGO_CONFIG_ID)?.cast_signed(),
            tile: get(A::CUBLASLT_ALGO_CONFIG_TILE_ID)?,
            stages: get(A::CUBLASLT_ALGO_CONFIG_STAGES_ID)?,
            split: get(A::CUBLASLT_ALGO_CONFIG_SPLITK_NUM)?.cast_signed(),
        })
    }
}

fn device_error(reason: impl Into<String>) -> Error {
    Error::Device { wanted: "cuda".into(), reason: reason.into() }
}

fn check(doing: &str, status: sys::cublasStatus_t) -> Result<()> {
    status.result().map_err(|e| device_error(format!("cuBLASLt: {doing}: {:?}", e.0)))
}

/// An object of the library, destroyed with this.
#[derive(Debug)]
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> sys::cublasStatus_t,
}

impl<T: Copy> Owned<*mut T> {
    fn new(
        what: &str,
        destroy: unsafe fn(*mut T) -> sys::cublasStatus_t,
        create: impl FnOnce(*mut *mut T) -> sys::cublasStatus_t,
    ) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        check(what, create(&mut raw))?;
        Ok(Self { raw, destroy })
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: it was created with what `destroy` belongs to, and nobody else has it.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// What the library is told of a product.
struct Described {
    desc: Owned<sys::cublasLtMatmulDesc_t>,
    /// A, B and D.
    layouts: [Owned<sys::cublasLtMatrixLayout_t>; 3],
}

impl Described {
    fn new(product: &Product) -> Result<Self> {
        use sys::{cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as A};
        let f32 = sys::cudaDataType::CUDA_R_32F;
        let desc = Owned::new("a product", sys::cublasLtMatmulDescDestroy, |to| {
            // SAFETY: `to` is writable.
            unsafe { sys::cublasLtMatmulDescCreate(to, Compute::CUBLAS_COMPUTE_32F, f32) }
        })?;
        let matrices = product.by_columns();
        let ops = [A::CUBLASLT_MATMUL_DESC_TRANSA, A::CUBLASLT_MATMUL_DESC_TRANSB];
        for (which, matrix) in ops.into_iter().zip(&matrices) {
            // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
            let op = u32::from(matrix.transposed);
            let at = (&raw const op).cast();
            // SAFETY: the attribute is a number of 4 bytes.
            let status = unsafe { sys::cublasLtMatmulDescSetAttribute(desc.raw, which, at, 4) };
            check("a transpose", status)?;
        }
        let out = match product.of {
            Of::BackwardWeight => f32,
            _ => sys::cudaDataType::CUDA_R_16BF,
        };
        let layout = |matrix: &Matrix, kind| {
            let (rows, cols) = (matrix.rows as u64, matrix.cols as u64);
            Owned::new("a matrix", sys::cublasLtMatrixLayoutDestroy, |to| {
                // SAFETY: `to` is writable.
                unsafe { sys::cublasLtMatrixLayoutCreate(to, kind, rows, cols, rows as i64) }
            })
        };
        let [a, b, d] = &matrices;
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        Ok(Self { desc, layouts: [layout(a, bf16)?, layout(b, bf16)?, layout(d, out)?] })
    }
}

/// The library, for one GPU.
#[derive(Debug)]
pub struct Lt {
    cuda: Cuda,
    handle: Owned<sys::cublasLtHandle_t>,
    /// Products run one after the other, so they share it.
    workspace: Buffer<'static, u8>,
}

impl Drop for Lt {
    fn drop(&mut self) {
        // The handle is destroyed in the context that it was made in.
        let _ = self.cuda.stream();
    }
}

impl Lt {
    /// cuBLASLt for this GPU.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        // Without the library every other call of the crate would panic.
        // SAFETY: looks for the library and opens it.
        if !unsafe { sys::is_culib_present() } {
            return Err(device_error("libcublasLt.so.13 was not found: cuBLASLt is not installed"));
        }
        cuda.stream()?;
        let handle = Owned::new("the handle", sys::cublasLtDestroy, |to| {
            // SAFETY: `to` is writable, and the GPU's context is that of this thread.
            unsafe { sys::cublasLtCreate(to) }
        })?;
        let workspace = Buffer::new(&Device::Cuda(cuda.clone()), "cuBLASLt", WORKSPACE)?;
        Ok(Self { cuda: cuda.clone(), handle, workspace })
    }

    /// Its version, such as 130002 for 13.0.2.
    pub fn version(&self) -> usize {
        // SAFETY: the library is there.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// The library's algorithms for a product, those first that it expects to be fast.
    pub fn algorithms(&self, product: &Product) -> Result<Vec<Algorithm>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as A;
        let told = Described::new(product)?;
        let destroy = sys::cublasLtMatmulPreferenceDestroy;
        let preference = Owned::new("a preference", destroy, |to| {
            // SAFETY: `to` is writable.
            unsafe { sys::cublasLtMatmulPreferenceCreate(to) }
        })?;
        let set = |what, value: &[u8]| {
            let (at, bytes) = (value.as_ptr().cast(), value.len());
            // SAFETY: `value` has the type of the attribute.
            let status = unsafe {
                sys::cublasLtMatmulPreferenceSetAttribute(preference.raw, what, at, bytes)
            };
            check("a preference", status)
        };
        let workspace = (WORKSPACE as u64).to_ne_bytes();
        set(A::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace)?;
        for operand in [
            A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(operand, &(PACKET as u32).to_ne_bytes())?;
        }
        let none = sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let (mut found, mut count) = ([none; ALGORITHMS], 0);
        let [a, b, d] = &told.layouts;
        self.cuda.stream()?;
        // SAFETY: all objects are alive, and there is room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.raw,
                told.desc.raw,
                a.raw,
                b.raw,
                d.raw,
                d.raw,
                preference.raw,
                ALGORITHMS as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(&format!("algorithms for {product:?}"), status)?;
        let found = &found[..count.unsigned_abs() as usize];
        found.iter().filter(|f| f.state.result().is_ok()).map(Algorithm::of).collect()
    }

    /// `out = left right`, the operands in the order of [`Of`]'s formulas; `add` adds to what `out`
    /// holds.
    pub fn product<T: Element, I: Element>(
        &self,
        product: &Product,
        algorithm: &Algorithm,
        out: ViewMut<'_, T>,
        (left, right): (View<'_, I>, View<'_, I>),
        add: bool,
    ) -> Result<()> {
        let want = if product.of == Of::BackwardWeight { f32::NAME } else { bf16::NAME };
        for (name, got, want) in [("left", I::NAME, bf16::NAME), ("out", T::NAME, want)] {
            if got != want {
                return Err(device_error(format!("cuBLASLt: `{name}` is {got}, wanted {want}")));
            }
        }
        let [a, b, d] = product.by_columns();
        let sizes = [left.len(), right.len(), out.len()];
        let wanted = [b, a, d].map(|matrix| matrix.cols * matrix.rows);
        assert_eq!(sizes, wanted, "elements of left, right and out");
        if out.is_empty() {
            return Ok(());
        }
        let begins = [left.address(), right.address(), out.address()];
        if let Some(at) = begins.iter().find(|at| !at.is_multiple_of(PACKET)) {
            let text =
                format!("cuBLASLt: a buffer begins at {at:#x}, wanted a multiple of {PACKET}");
            return Err(device_error(text));
        }
        let pointer = |at: usize| std::ptr::without_provenance_mut::<c_void>(at);
        let [left, right, out] = begins.map(pointer);
        let told = Described::new(product)?;
        let [a, b, d] = &told.layouts;
        let (one, other) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let scratch = pointer(self.workspace.view().address());
        let stream = self.cuda.stream()?;
        // SAFETY: the buffers have the sizes that the layouts say, as was just checked, and `out`
        // is exclusive; the factors are read before the call returns; the workspace is used by
        // products of this stream alone.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle.raw,
                told.desc.raw,
                (&raw const one).cast(),
                right,
                a.raw,
                left,
                b.raw,
                (&raw const other).cast(),
                out,
                d.raw,
                out,
                d.raw,
                &algorithm.algo,
                scratch,
                // All there is: another number of rows may need more than the search was told of.
                WORKSPACE,
                stream.cast(),
            )
        };
        check(&format!("{product:?}, {algorithm}"), status)
    }
}
