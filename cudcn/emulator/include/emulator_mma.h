// ldmatrix and mma with the fragment layouts of the PTX manual. kernels_cu/mma.cuh has the same functions as PTX.
#pragma once

namespace emulator {

inline void require_full_warp(const Collective &collective, unsigned participants) {
  if (participants == 0xffffffffu) return;
  fail("%s needs a full warp (%s:%d)", collective.name, base_name(collective.site.file), collective.site.line);
}

// ---- ldmatrix
struct LoadMatrix : Collective {
  const void *row;
  unsigned *registers;
  int matrices;
  bool transposed;
};

EMULATOR_UNCHECKED void load_row(uint16_t (&row)[8], const LoadMatrix &self, int lane) {
  const Site site = self.site;
  if (reinterpret_cast<uintptr_t>(self.row) % 16) {
    fail("%s: row address of lane %d is not 16-byte aligned (%s:%d)", self.name, lane, base_name(site.file),
         site.line);
  }
  if (!is_shared_memory(self.row, 16)) {
    fail("%s: row address of lane %d is outside shared memory (%s:%d)", self.name, lane, base_name(site.file),
         site.line);
  }
  check_access(lane, self.row, 16, AccessKind::read, site);
  memcpy(row, self.row, 16);
}

// Lanes 8i to 8i + 7 give the row addresses of matrix i; lane 4r + c receives elements 2c and 2c + 1 of row r.
EMULATOR_UNCHECKED void execute_load_matrix(Collective *const *lanes, unsigned participants) {
  require_full_warp(*lanes[__builtin_ctz(participants)], participants);
  const auto *first = static_cast<LoadMatrix *>(lanes[0]);
  for (int matrix = 0; matrix < first->matrices; matrix++) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; row++) {
      const int lane = matrix * 8 + row;
      load_row(element[row], *static_cast<LoadMatrix *>(lanes[lane]), lane);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const unsigned low = first->transposed ? element[column][row] : element[row][column];
      const unsigned high = first->transposed ? element[column + 1][row] : element[row][column + 1];
      static_cast<LoadMatrix *>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
}

inline void load_matrix(const char *name, unsigned *registers, const void *row, int matrices, bool transposed,
                        Site site) {
  LoadMatrix self;
  self.name = name;
  self.site = site;
  self.mask = 0xffffffffu;
  self.execute = execute_load_matrix;
  self.row = row;
  self.registers = registers;
  self.matrices = matrices;
  self.transposed = transposed;
  join_collective(self);
}

// ---- mma
struct MatrixMultiply : Collective {
  float *d;
  const unsigned *a, *b;
  const float *c;
};

// The accumulators' layout is the same for both shapes: register i of lane 4g + t is row g or g + 8 and column 2t or
// 2t + 1.
inline int accumulator_row(int lane, int i) { return lane / 4 + (i >> 1) * 8; }
inline int accumulator_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

template <int K>
EMULATOR_UNCHECKED void multiply(Collective *const *lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto *self = static_cast<MatrixMultiply *>(lanes[lane]);
    for (int i = 0; i < 4; i++) d[accumulator_row(lane, i)][accumulator_column(lane, i)] = self->c[i];
  }
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < K; k++) {
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    const auto *self = static_cast<MatrixMultiply *>(lanes[lane]);
    for (int i = 0; i < 4; i++) self->d[i] = d[accumulator_row(lane, i)][accumulator_column(lane, i)];
  }
}

template <class T>
EMULATOR_UNCHECKED void execute_mma_m16n8k16(Collective *const *lanes, unsigned participants) {
  require_full_warp(*lanes[__builtin_ctz(participants)], participants);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto *self = static_cast<MatrixMultiply *>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      const int row = group + (i & 1) * 8, k = pair + (i >> 1) * 8;
      a[row][k] = T::from_bits(uint16_t(self->a[i]));
      a[row][k + 1] = T::from_bits(uint16_t(self->a[i] >> 16));
    }
    for (int i = 0; i < 2; i++) {
      const int k = pair + i * 8;
      b[k][group] = T::from_bits(uint16_t(self->b[i]));
      b[k + 1][group] = T::from_bits(uint16_t(self->b[i] >> 16));
    }
  }
  multiply<16>(lanes, a, b);
}

inline float tf32_to_float(unsigned bits) { return float_from_bits(bits & 0xffffe000u); }  // as the hardware truncates

EMULATOR_UNCHECKED void execute_mma_m16n8k8_tf32(Collective *const *lanes, unsigned participants) {
  require_full_warp(*lanes[__builtin_ctz(participants)], participants);
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto *self = static_cast<MatrixMultiply *>(lanes[lane]);
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; i++) a[group + (i & 1) * 8][k + (i >> 1) * 4] = tf32_to_float(self->a[i]);
    for (int i = 0; i < 2; i++) b[k + i * 4][group] = tf32_to_float(self->b[i]);
  }
  multiply<8>(lanes, a, b);
}

inline void matrix_multiply(const char *name, void (*execute)(Collective *const *, unsigned), float *d,
                            const unsigned *a, const unsigned *b, const float *c, Site site) {
  MatrixMultiply self;
  self.name = name;
  self.site = site;
  self.mask = 0xffffffffu;
  self.execute = execute;
  self.d = d;
  self.a = a;
  self.b = b;
  self.c = c;
  join_collective(self);
}

}  // namespace emulator

inline void ldmatrix_x4(unsigned (&registers)[4], const void *row, EMULATOR_SITE) {
  emulator::load_matrix("ldmatrix.x4", registers, row, 4, false, site);
}

inline void ldmatrix_x4_trans(unsigned (&registers)[4], const void *row, EMULATOR_SITE) {
  emulator::load_matrix("ldmatrix.x4.trans", registers, row, 4, true, site);
}

inline void ldmatrix_x2(unsigned (&registers)[2], const void *row, EMULATOR_SITE) {
  emulator::load_matrix("ldmatrix.x2", registers, row, 2, false, site);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                         EMULATOR_SITE) {
  emulator::matrix_multiply("mma.m16n8k16", emulator::execute_mma_m16n8k16<T>, d, a, b, c, site);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                             EMULATOR_SITE) {
  emulator::matrix_multiply("mma.m16n8k8.tf32", emulator::execute_mma_m16n8k8_tf32, d, a, b, c, site);
}

// cvt.rna: to nearest, ties away from zero.
inline unsigned f32_to_tf32(float value) {
  const unsigned bits = emulator::float_bits(value);
  const bool is_finite = (bits & 0x7fffffff) < 0x7f800000;
  return is_finite ? (bits + 0x1000) & 0xffffe000u : bits;
}
