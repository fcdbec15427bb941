// cuBLAS's handles, and its gemmEx as a plain loop with float64 sums, rounded once.
#include "device.h"

#include <cstring>

using Status = int;
constexpr Status SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15;

namespace {

enum Type { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT16 = 14 };             // cudaDataType
enum Compute { IN_FLOAT = 68, IN_FLOAT_PEDANTIC = 69, IN_DOUBLE = 70, IN_DOUBLE_PEDANTIC = 71 };  // cublasComputeType_t

struct Handle {
  void *stream = nullptr;
};

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double load(const void *data, int type, size_t index) {
  switch (type) {
    case FLOAT: return static_cast<const float *>(data)[index];
    case DOUBLE: return static_cast<const double *>(data)[index];
    case HALF: return static_cast<const _Float16 *>(data)[index];
    default: return from_bfloat16(static_cast<const uint16_t *>(data)[index]);
  }
}

void store(void *data, int type, size_t index, double value) {
  switch (type) {
    case FLOAT: static_cast<float *>(data)[index] = float(value); break;
    case DOUBLE: static_cast<double *>(data)[index] = value; break;
    case HALF: static_cast<_Float16 *>(data)[index] = _Float16(value); break;
    default: static_cast<uint16_t *>(data)[index] = to_bfloat16(float(value));
  }
}

bool is_supported(int a, int b, int c, int compute) {
  if (a != b) return false;
  if (compute == IN_DOUBLE || compute == IN_DOUBLE_PEDANTIC) return a == DOUBLE && c == DOUBLE;
  if (compute != IN_FLOAT && compute != IN_FLOAT_PEDANTIC) return false;  // it would sum in half, or multiply in TF32
  return a == FLOAT ? c == FLOAT : (a == HALF || a == BFLOAT16) && (c == a || c == FLOAT);
}

size_t item_size(int type) { return type == DOUBLE ? 8 : type == FLOAT ? 4 : 2; }

// Whether a matrix, column by column in memory, lies within a block of this device.
bool lies_on(int device, const void *data, int type, int rows, int columns, int step) {
  const size_t size = (size_t(columns - 1) * size_t(step) + size_t(rows)) * item_size(type);
  const fake::Block block = fake::block_of(data);
  return block.begin && block.device == device && uintptr_t(data) + size <= block.begin + block.size;
}

// Rows of a matrix, column by column in memory, as float64.
std::vector<double> rows_of(const void *data, int type, bool transposed, size_t rows, size_t columns, size_t step) {
  std::vector<double> wide(rows * columns);
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < columns; j++)
      wide[i * columns + j] = load(data, type, transposed ? j + i * step : i + j * step);
  return wide;
}

}  // namespace

extern "C" {

Status cublasCreate_v2(Handle **handle) {
  *handle = new Handle;
  return SUCCESS;
}

Status cublasDestroy_v2(Handle *handle) {
  delete handle;
  return SUCCESS;
}

Status cublasSetStream_v2(Handle *handle, void *stream) {
  handle->stream = stream;
  return SUCCESS;
}

Status cublasSetMathMode(Handle *, int) { return SUCCESS; }

Status cublasGetVersion_v2(Handle *, int *version) {
  *version = 130000;
  return SUCCESS;
}

// C (m, n) = alpha A (m, k) B (k, n) + beta C
Status cublasGemmEx(Handle *handle, int a_transposed, int b_transposed, int m, int n, int k, const void *alpha,
                    const void *a, int a_type, int a_step, const void *b, int b_type, int b_step, const void *beta,
                    void *c, int c_type, int c_step, int compute, int) {
  NOTE(handle->stream);
  fake::Stream *stream = fake::find_stream(handle->stream);
  if (!stream || fake::device_of(stream) != fake::current_device()) return INVALID_VALUE;
  if (!is_supported(a_type, b_type, c_type, compute)) return NOT_SUPPORTED;
  if (a_step < (a_transposed ? k : m) || b_step < (b_transposed ? n : k) || c_step < m) return INVALID_VALUE;
  const int device = fake::current_device();
  if (!lies_on(device, a, a_type, a_transposed ? k : m, a_transposed ? m : k, a_step) ||
      !lies_on(device, b, b_type, b_transposed ? n : k, b_transposed ? k : n, b_step) ||
      !lies_on(device, c, c_type, m, n, c_step))
    return INVALID_VALUE;
  const int scalar = a_type == DOUBLE ? DOUBLE : FLOAT;
  const double scale = load(alpha, scalar, 0), keep = load(beta, scalar, 0);
  fake::enqueue(stream, [=] {
    const std::vector<double> rows = rows_of(a, a_type, a_transposed, size_t(m), size_t(k), size_t(a_step));
    const std::vector<double> columns = rows_of(b, b_type, !b_transposed, size_t(n), size_t(k), size_t(b_step));
    for (size_t j = 0; j < size_t(n); j++) {
      for (size_t i = 0; i < size_t(m); i++) {
        double sum = 0;
        for (size_t p = 0; p < size_t(k); p++) sum += rows[i * size_t(k) + p] * columns[j * size_t(k) + p];
        const size_t at = i + j * size_t(c_step);
        store(c, c_type, at, scale * sum + (keep ? keep * load(c, c_type, at) : 0));
      }
    }
  });
  return SUCCESS;
}

}  // extern "C"
