/* w8a8: int8 linear layers on a CPU.  Plain C, so that ctypes, a torch shim or anything else can call it.
 *
 * Shapes: M tokens, N out features, K in features.
 *
 * What is computed (the arithmetic contract, bit for bit, in float32):
 *
 *     acc[m, n] = sum_k (qx[m, k] - zx[m]) * qw[n, k]            exact in int32
 *     y = float32(acc) * sx[m];  y = y * sw[n];  y = y + bias[n]  three roundings, no fused multiply-add
 *
 * then one cast to the dtype of x.  Every instruction set gives the same bits.
 *
 * A row of x that holds a NaN or an infinity gives a NaN row of y, and no other; where the whole tensor shares one
 * dynamic scale, such rows take no part in the shared range.
 *
 * Threads: any number of threads may call at once.  The library starts no thread of its own while an OpenMP runtime is
 * loaded in the process: it borrows that one (torch's).
 */
#ifndef W8A8_H
#define W8A8_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define W8A8_API __attribute__((visibility("default")))
#define W8A8_ABI 10      /* raised whenever a struct, a function or a signature changes, below or in python.cpp */
#define W8A8_PANEL 32    /* output columns in one panel of packed weights */

enum w8a8_dtype { W8A8_F32 = 0, W8A8_BF16 = 1, W8A8_F16 = 2 };

enum w8a8_mode {
  W8A8_TOKEN_SYM = 0,   /* one scale per row, from the row */
  W8A8_TOKEN_ASYM = 1,
  W8A8_TENSOR_SYM = 2,  /* one scale for all rows, from all rows */
  W8A8_TENSOR_ASYM = 3,
  W8A8_STATIC_SYM = 4,  /* one scale for all rows, given in the layer; codes saturate at -2**(bits-1) */
  W8A8_STATIC_ASYM = 5
};

enum w8a8_status {
  W8A8_OK = 0,
  W8A8_BAD_ARGUMENT = -1,   /* unknown dtype or mode, bits outside 2..8, a negative size, layers that differ in K ... */
  W8A8_K_TOO_LARGE = -2,    /* the sum over K might not fit in int32 */
  W8A8_NO_MEMORY = -3
};

/* One linear layer.  The caller owns the struct and all it points to; nothing here is written. */
typedef struct w8a8_layer {
  const int8_t *packed;    /* w8a8_pack's output */
  const float *scale;      /* weight scale, (N,), or (1,) with scale_stride 0 */
  const int32_t *colsum;   /* sum over K of the weight codes, (N,): w8a8_pack's second output */
  const float *bias;       /* (N,) or null */
  int64_t n, k;
  int32_t scale_stride;    /* 1 per channel, 0 per tensor */
  int32_t mode;            /* enum w8a8_mode */
  int32_t bits;            /* of the activation grid, 2..8 */
  int32_t x_zero_point;    /* STATIC_ASYM only */
  float x_scale;           /* STATIC_* only */
} w8a8_layer;

/* What may stand before and behind a product in the same pass, float32 only. */
enum w8a8_activation {   /* of a product's output, in its place */
  W8A8_IDENTITY = 0,
  W8A8_RELU = 1,
  W8A8_GELU = 2,         /* by the error function */
  W8A8_GELU_TANH = 3,
  W8A8_SILU = 4
};

/* sum = x + add; out = LayerNorm(sum, or x where add is null).  Rows of k floats, one after the other. */
typedef struct w8a8_norm {
  const float *add;      /* or null */
  float *sum;            /* or null: not wanted */
  float *out;            /* or null: not wanted */
  const float *weight, *bias;   /* (k) or null */
  float eps;
} w8a8_norm;

/* y[i] = x @ layer[i].T for `count` layers that read the same x in the same mode (q, k and v; gate and up); x is quantised
 * once.
 * x: (M, K), row stride ldx in elements, inner stride 1.  y[i]: (M, N_i), row stride ldy[i], the dtype of x.
 * threads: how many to use at most; 0 asks the OpenMP runtime (omp_get_max_threads of the calling thread). */
W8A8_API int w8a8_linear_many(const w8a8_layer *const *layers, int32_t count, const void *x, int32_t dtype, int64_t m,
                              int64_t ldx, void *const *y, const int64_t *ldy, int32_t threads);

/* The same with float32 rows that are normalised just before they are quantised (`before` may be null; the scale of a row
 * has to be its own, or given: not W8A8_TENSOR_*), and outputs that are activated while they are hot: activation[i] is an
 * enum w8a8_activation of layer i, null for none. */
W8A8_API int w8a8_linear_fused(const w8a8_norm *before, const w8a8_layer *const *layers, int32_t count, const void *x,
                               int32_t dtype, int64_t m, int64_t ldx, void *const *y, const int64_t *ldy,
                               const int32_t *activation, int32_t threads);

/* Only the first part: m rows of k floats. */
W8A8_API int w8a8_normalize(const w8a8_norm *norm, const float *x, int64_t m, int64_t k, int32_t threads);

/* softmax(scale q k^T + mask) v by heads, float32.  Strides are in elements, by batch, head and token; the innermost is 1.
 * shared: how many heads of q use one of k and v.  mask: null, or float32 to add (mask_is_float), or bytes that are not
 * zero where a key is seen, with strides by batch, head, query and key.  causal: query i sees the keys 0..i.  A query that
 * sees no key gives zeros. */
typedef struct w8a8_attention {
  const float *q, *k, *v;
  float *out;
  const void *mask;
  int64_t batch, heads, shared, queries, keys, dims;
  int64_t q_at[3], k_at[3], v_at[3], out_at[3], mask_at[4];
  float scale;
  int32_t causal, mask_is_float;
} w8a8_attention;
W8A8_API int w8a8_attend(const w8a8_attention *a, int32_t threads);

/* Keys and values of the past of one layer, in int8: each with a scale per token and head, symmetric; keys rotated, which
 * w8a8/kernels/cached.py describes.  `room` tokens, a multiple of 16.  In the keys, sixteen tokens lie side by side, two
 * elements of each together. */
typedef struct w8a8_cached {
  int8_t *keys;          /* [batch][heads][room / 16][ceil(key_dims / 2)][16][2] */
  float *key_scale;      /* [batch][heads][room] */
  int8_t *values;        /* [batch][heads][room][value_dims rounded up to 16] */
  float *value_scale;    /* [batch][heads][room] */
  int64_t batch, heads, room, key_dims, value_dims;
} w8a8_cached;

/* Quantises tokens into the places at .. at + tokens.  Strides in elements by batch, head and token; the innermost is 1.
 * A key or value that is not finite gets codes 0 and scale NaN. */
W8A8_API int w8a8_cached_append(const w8a8_cached *to, const void *keys, const int64_t *keys_at, const void *values,
                                const int64_t *values_at, int32_t dtype, int64_t at, int64_t tokens, int32_t threads);
/* The same for tokens of several sequences: keys and values are one sequence's, and where (tokens, 2) says which sequence of
 * `to` each belongs to, and which place there. */
W8A8_API int w8a8_cached_deal(const w8a8_cached *to, const void *keys, const int64_t *keys_at, const void *values,
                              const int64_t *values_at, int32_t dtype, const int32_t *where, int64_t tokens, int32_t threads);

/* The keys, or the values, of the places start .. start + tokens, dequantised: (batch, heads, tokens, dims), contiguous. */
W8A8_API int w8a8_cached_read(const w8a8_cached *from, int32_t keys, int64_t start, int64_t tokens, int32_t dtype, void *out,
                              int32_t threads);

/* Attention over the places start .. end, for few queries; w8a8/kernels/cached.py says what is computed.
 * q: strides as above; out: (batch, queries, heads * shared, value_dims), contiguous; both of one dtype.
 * mask: as in w8a8_attention, (.., .., queries, end - start).  causal: the last query sees all, each before one less.
 * softcap: 0 for none.  sinks: (heads * shared) scores of a key without a value, or null. */
typedef struct w8a8_cached_attention {
  w8a8_cached cached;
  const void *q;
  void *out;
  const void *mask;
  const float *sinks;
  int64_t shared, queries, start, end;
  int64_t q_at[3], mask_at[4];
  float scale, softcap;
  int32_t dtype, causal, mask_is_float;
  /* Or keys and values as they came, in the dtype of q, where cached.keys is null, which then has their sizes alone. */
  const void *keys, *values;
  int64_t keys_at[3], values_at[3];
  /* null, or (batch, 3): the sequence of the cache that each of q looks at, and instead of start and end those of its own;
   * then there is one query, and no mask. */
  const int32_t *ranges;
  int64_t batch;
} w8a8_cached_attention;
W8A8_API int w8a8_cached_attend(const w8a8_cached_attention *a, int32_t threads);

/* Many of these one after the other, over matrices of a row per token, the slots: what lies between two operations that
 * are not of these kinds is one call.  There are batch * length tokens; attention is within each of the `batch` sequences.
 * Rows pass through as many steps as possible while they are in cache. */
enum w8a8_step_kind {
  W8A8_STEP_LINEAR = 0,   /* w8a8_linear_fused: (x, add) -> sum, normed, out[...] */
  W8A8_STEP_NORM = 1,     /* w8a8_normalize: (x, add) -> sum, normed */
  W8A8_STEP_SUM = 2,      /* x + add -> sum */
  W8A8_STEP_ATTEND = 3    /* w8a8_attend: (q, k, v) -> out[0] */
};
typedef struct w8a8_step {
  int32_t kind;
  int32_t x, add, sum, normed;            /* slots; -1 for none */
  int32_t has_norm;                       /* of a W8A8_STEP_LINEAR */
  const float *weight, *bias;             /* of the norm */
  float eps;
  int32_t count;                          /* layers */
  const w8a8_layer *layers;
  const int32_t *out, *activation;        /* by layer */
  int32_t q, k, v, heads, shared, mask;   /* mask: an index, or -1 */
  float scale;
  int32_t causal;
} w8a8_step;
typedef struct w8a8_slot {
  int64_t width;
  const float *given;    /* an input: nothing writes it */
  float *wanted;         /* an output */
} w8a8_slot;
typedef struct w8a8_mask {   /* broadcast to (batch, heads, length, length), strides in elements */
  const void *data;
  int32_t is_float;
  int64_t at[4];
} w8a8_mask;
typedef struct w8a8_plan {
  int64_t batch, length;
  const w8a8_step *steps;
  const w8a8_slot *slots;
  const w8a8_mask *masks;
  int32_t step_count, slot_count, mask_count;
  int32_t skip_padding;   /* leave out tokens that no query sees, in everything; their rows of outputs are zero */
  const int64_t *read;    /* tokens of every sequence that somebody reads: where one is padding, that sequence is computed */
  int32_t read_count;
} w8a8_plan;
W8A8_API int w8a8_run(const w8a8_plan *plan, int32_t threads);

/* w8a8_linear_many for one layer. */
W8A8_API int w8a8_linear(const w8a8_layer *layer, const void *x, int32_t dtype, int64_t m, int64_t ldx, void *y,
                         int64_t ldy, int32_t threads);

/* Weights (N, K) row-major with row stride ldw -> panels [ceil(N/32)][steps][32][group], zeros where there is no weight.
 * group is w8a8_panel_group(): 8 on AArch64, 4 elsewhere; steps * group is K, rounded up to a multiple of group, on x86
 * of 64.  So the layout is the same for every instruction set of an architecture.  colsum: (N,) out.  64-byte aligned
 * `packed` is faster, not required. */
W8A8_API int64_t w8a8_packed_bytes(int64_t n, int64_t k);
W8A8_API int32_t w8a8_panel_group(void);
W8A8_API int w8a8_pack(const int8_t *w, int64_t ldw, int64_t n, int64_t k, int8_t *packed, int32_t *colsum,
                       int32_t threads);

/* Asks the system for large pages under freshly allocated memory, before anything is written there: worth it for packed
 * weights of 2 MiB and more (one row then runs 1.05 to 1.2 times as fast on Zen 4).  A wish: returns 0 where it was taken. */
W8A8_API int w8a8_advise_huge(void *data, int64_t bytes);

/* Only the first half of a linear: codes (M, K) and one scale and zero point per row (equal in all rows for TENSOR and
 * STATIC).  A row that is not finite gets codes 0 and scale NaN.  offset is added to every code and the sum is stored
 * modulo 256: 0 gives int8 codes, 128 the unsigned ones that u8 x s8 products want. */
W8A8_API int w8a8_quantize_rows(const void *x, int32_t dtype, int64_t m, int64_t k, int64_t ldx, int32_t mode,
                                int32_t bits, float x_scale, int32_t x_zero_point, int32_t offset, uint8_t *codes,
                                int64_t ldq, float *scale, int32_t *zero_point, int32_t threads);

/* Only the second half: int32 sums of someone else's product (torch._int_mm) -> y.  acc (M, N), row stride lda, holds
 * sum_k (qx + offset) * qw; the layer's `packed` is not read. */
W8A8_API int w8a8_finish(const w8a8_layer *layer, const int32_t *acc, int64_t lda, int64_t m, int32_t offset,
                         const float *scale, const int32_t *zero_point, int32_t dtype, void *y, int64_t ldy,
                         int32_t threads);

/* Which instruction set runs.  Names: portable, avx2, avxvnni, avx512vnni256, avx512vnni, amx, neon_dot, neon_i8mm.
 * By a table of least sizes (dispatch.cpp), or the one in the environment variable W8A8_ISA where that is set and possible.
 * w8a8_isa_use(name) switches the whole process; null or "" goes back to the table.  Returns W8A8_BAD_ARGUMENT for a
 * name that is unknown or that this CPU cannot run. */
W8A8_API const char *w8a8_isa_name(void);               /* the forced one, or the first of the table */
W8A8_API int w8a8_isa_count(void);
W8A8_API const char *w8a8_isa_at(int i, int *usable);   /* all that were compiled in, best last */
W8A8_API const char *w8a8_isa_why_not(int i);           /* null where it can be used */
W8A8_API uint64_t w8a8_isa_runs(int i);                 /* how many products it has run in this process */
W8A8_API int w8a8_isa_use(const char *name);

/* How far ahead the weights of a product of a few rows are prefetched here. */
W8A8_API const char *w8a8_stream_name(void);

/* Line i of the table on this CPU, or null: the first line whose least numbers of rows and of K a product reaches runs it. */
W8A8_API const char *w8a8_choice_at(int i, int64_t *rows, int64_t *k);

/* How the parallel loop is run: "openmp <path of the runtime>", "threads" (our own) or "serial". */
W8A8_API const char *w8a8_parallel_name(void);
W8A8_API int w8a8_abi(void);

/* The ceilings of this machine, for the bench: int8 operations per second (a multiply and an add are two) of the
 * instruction set in use, and bytes per second of a plain read of `bytes` bytes.  Each runs for about `seconds`. */
W8A8_API double w8a8_peak_ops(double seconds, int32_t threads);
W8A8_API double w8a8_peak_read(const void *data, int64_t bytes, double seconds, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
