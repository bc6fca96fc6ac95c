// Products, factors and solutions of dense matrices.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Four sums at once, of four rows of a matrix times a vector: one alone waits for its additions.
template <class T>
static inline void four_products(const T* a, long stride, const T* x, long n, T* sums) {
  const T *b = a + stride, *c = b + stride, *d = c + stride;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (long k = 0; k < n; k++) {
    const T factor = x[k];
    s0 += a[k] * factor, s1 += b[k] * factor, s2 += c[k] * factor, s3 += d[k] * factor;
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}
// The same of any number of rows.
template <class T>
static inline void products(const T* a, long stride, long rows, const T* x, long n, T* sums) {
  long i = 0;
  for (; i + 4 <= rows; i += 4) four_products(a + i * stride, stride, x, n, sums + i);
  for (; i < rows; i++) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < n; k++) sum += a[i * stride + k] * x[k];
    sums[i] = sum;
  }
}
// Adds rows of a matrix, each times its factor, to a vector: four at a time.
template <class T>
static inline void add_rows(const T* a, long stride, long rows, const T* x, long step, long n,
                            T* o) {
  long i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *b = a + i * stride, *c = b + stride, *d = c + stride, *e = d + stride;
    const T x0 = x[i * step], x1 = x[(i + 1) * step];
    const T x2 = x[(i + 2) * step], x3 = x[(i + 3) * step];
#pragma omp simd
    for (long j = 0; j < n; j++) o[j] += (x0 * b[j] + x1 * c[j]) + (x2 * d[j] + x3 * e[j]);
  }
  for (; i < rows; i++) {
    const T factor = x[i * step], *row = a + i * stride;
#pragma omp simd
    for (long j = 0; j < n; j++) o[j] += factor * row[j];
  }
}

// So many rows of a times a panel of b, whose rows are registers next to each other.
template <long ROWS, long COLUMNS, class T>
static inline void block(const T* a, long ar, long ac, const T* panel, long length, T* o, long orow,
                         long oc, long rows, long columns) {
  typedef T Vector __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  constexpr long WIDE = 32 / sizeof(T), PARTS = COLUMNS / WIDE;
  Vector sums[ROWS][PARTS] = {};
  for (long k = 0; k < length; k++) {
    const Vector* row = reinterpret_cast<const Vector*>(panel + k * COLUMNS);
#pragma GCC unroll 8
    for (long p = 0; p < ROWS; p++) {
      const T factor = a[p * ar + k * ac];
#pragma GCC unroll 8
      for (long j = 0; j < PARTS; j++) sums[p][j] += factor * row[j];
    }
  }
  for (long p = 0; p < rows; p++)
    for (long j = 0; j < columns; j++) o[p * orow + j * oc] = sums[p][j / WIDE][j % WIDE];
}
// The product of matrices by blocks that registers hold: else sums go to memory and back each time.
template <long N, long K, long M, long AR, long AC, long BR, long BC, long OR, long OC, class T>
static void product_by_blocks(const T* a, const T* b, T* o) {
  constexpr long ROWS = 4, COLUMNS = 96 / sizeof(T), DONE = N / ROWS * ROWS;
  T panel[K * COLUMNS], last[ROWS * K];
  for (long p = 0; DONE < N && p < ROWS; p++)
    for (long k = 0; k < K; k++)
      last[p * K + k] = DONE + p < N ? a[(DONE + p) * AR + k * AC] : T(0);
  for (long j = 0; j < M; j += COLUMNS) {
    const long columns = std::min(COLUMNS, M - j);
    for (long k = 0; k < K; k++)
      for (long c = 0; c < COLUMNS; c++)
        panel[k * COLUMNS + c] = c < columns ? b[k * BR + (j + c) * BC] : T(0);
    T* out = o + j * OC;
    for (long i = 0; i < DONE; i += ROWS)
      block<ROWS, COLUMNS>(a + i * AR, AR, AC, panel, K, out + i * OR, OR, OC, ROWS, columns);
    if (DONE < N)
      block<ROWS, COLUMNS>(last, K, 1, panel, K, out + DONE * OR, OR, OC, N - DONE, columns);
  }
}

// o = a b, of shapes (N, K) and (K, M); strides by rows and columns.
template <long N, long K, long M, long AR, long AC, long BR, long BC, long OR, long OC, class T>
static inline void product(const T* a, const T* b, T* o) {
  if constexpr (N >= 8 && M >= 8 && K >= 8 && K <= 2048) {  // of a panel on the stack
    product_by_blocks<N, K, M, AR, AC, BR, BC, OR, OC>(a, b, o);
  } else if constexpr (AC == 1 && BR == 1 && OR == 1) {  // rows times columns
    for (long j = 0; j < M; j++) products(a, AR, N, b + j * BC, K, o + j * OC);
  } else if constexpr (AC == 1 && BR == 1 && OC == 1) {
    for (long i = 0; i < N; i++) products(b, BC, M, a + i * AR, K, o + i * OR);
  } else if constexpr ((AC == 1 || AC == 0) && (BR == 1 || M == 1)) {
    for (long i = 0; i < N; i++)
      for (long j = 0; j < M; j++) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < K; k++) sum += a[i * AR + k * AC] * b[k * BR + j * BC];
        o[i * OR + j * OC] = sum;
      }
  } else if constexpr (M == 1 && OR == 1 && AR == 1) {  // columns of a, one after the other
    for (long i = 0; i < N; i++) o[i] = 0;
    add_rows(a, AC, K, b, BR, N, o);
  } else if constexpr (BC == 1 && OC == 1) {  // rows of b likewise
    for (long i = 0; i < N; i++) {
      for (long j = 0; j < M; j++) o[i * OR + j] = 0;
      add_rows(b, BR, K, a + i * AR, AC, M, o + i * OR);
    }
  } else {
    for (long i = 0; i < N; i++) {
      for (long j = 0; j < M; j++) o[i * OR + j * OC] = 0;
      for (long k = 0; k < K; k++) {
        const T factor = a[i * AR + k * AC];
#pragma omp simd
        for (long j = 0; j < M; j++) o[i * OR + j * OC] += factor * b[k * BR + j * BC];
      }
    }
  }
}

// The lower factor of a symmetric matrix; returns the number of the minor that is not positive.
template <class T>
static int32_t cholesky(const T* a, T* o, long n, long ar, long ac, long orow, long oc) {
  int32_t failed = 0;
  for (long j = 0; j < n; j++) {
    T* column = o + j * oc;
    for (long i = 0; i < n; i++) column[i * orow] = i < j ? T(0) : a[i * ar + j * ac];
    if (orow == 1) {  // columns before it, each times its number in this row
      T* negative = column;  // the numbers above the diagonal, which become zero
      for (long k = 0; k < j; k++) negative[k] = -o[j + k * oc];
      add_rows(o + j, oc, j, negative, 1, n - j, column + j);
      for (long k = 0; k < j; k++) negative[k] = 0;
    } else {
      for (long i = j; i < n; i++) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < j; k++) sum += o[i * orow + k * oc] * o[j * orow + k * oc];
        column[i * orow] -= sum;
      }
    }
    T& corner = column[j * orow];
    if (!(corner > 0) && !failed) failed = static_cast<int32_t>(j + 1);
    corner = std::sqrt(corner);
    for (long i = j + 1; i < n; i++) column[i * orow] /= corner;
  }
  return failed;
}

// The slope in a symmetric matrix, of which both triangles have a part, from that in its lower
// factor l: columns are taken back one after the other, the last first. Rows of o lie together.
template <class T>
static void cholesky_adjoint(const T* l, const T* slope, T* o, long n, long lr, long lc, long sr,
                             long sc) {
  T *column = new T[2 * n], *sums = column + n;
  for (long j = n - 1; j >= 0; j--) {
    const long rest = n - j - 1;
    const T corner = l[j * (lr + lc)];
    for (long i = 0; i < rest; i++) column[i] = l[(j + 1 + i) * lr + j * lc];
    products(o + (j + 1) * (n + 1), n, rest, column, rest, sums);
    T own = slope[j * (sr + sc)];
    for (long i = 0; i < rest; i++) {
      const long row = j + 1 + i;
      const T found = (slope[row * sr + j * sc] - 2 * sums[i]) / corner;
      own -= found * column[i];
      o[row * n + j] = o[j * n + row] = found / 2;
    }
    o[j * (n + 1)] = own / (2 * corner);
  }
  delete[] column;
}

// X of a X = b, for a triangular matrix of n rows and m columns of b; four unknown rows at a time.
template <class T>
static void solve_triangular(const T* a, const T* b, T* o, long n, long m, long ar, long ac, long br,
                             long bc, long orow, long oc, bool upper, bool unit) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < m; j++) o[i * orow + j * oc] = b[i * br + j * bc];
  const bool rows = ac == 1 && orow == 1, columns = !rows && ar == 1 && orow == 1;
  for (long done = 0, wide; done < n; done += wide) {
    wide = std::min(4L, n - done);
    const long top = upper ? n - done - wide : done, bottom = top + wide;
    const long first = upper ? bottom : 0, known = done;
    for (long j = 0; rows && j < m; j++) {  // rows of the matrix lie together
      T sums[4], *column = o + j * oc;
      products(a + top * ar + first, ar, wide, column + first, known, sums);
      for (long p = 0; p < wide; p++) column[top + p] -= sums[p];
    }
    for (long i = top; !rows && !columns && i < bottom; i++)
      for (long k = first; k < first + known; k++) {
        const T factor = a[i * ar + k * ac], *other = o + k * orow;
        T* row = o + i * orow;
#pragma omp simd
        for (long j = 0; j < m; j++) row[j * oc] -= factor * other[j * oc];
      }
    for (long p = 0; p < wide; p++) {  // the triangle on the diagonal
      const long i = upper ? bottom - 1 - p : top + p;
      T* row = o + i * orow;
      for (long j = 0; !unit && j < m; j++) row[j * oc] /= a[i * ar + i * ac];
      for (long k = upper ? top : i + 1; k < (upper ? i : bottom); k++) {
        const T factor = a[k * ar + i * ac];
        for (long j = 0; j < m; j++) o[k * orow + j * oc] -= factor * row[j * oc];
      }
    }
    for (long j = 0; columns && j < m; j++) {  // its columns do: what is found leaves the others
      T negative[4], *column = o + j * oc;
      for (long p = 0; p < wide; p++) negative[p] = -column[top + p];
      const long begin = upper ? 0 : bottom, rest = n - bottom;
      add_rows(a + begin + top * ac, ac, wide, negative, 1, upper ? top : rest, column + begin);
    }
  }
}

// The factors of a square matrix in one, its rows exchanged so that the largest number left in a
// column divides the others; with which row each was exchanged, counted from one.
template <class T>
static void lu(const T* a, T* o, int32_t* pivots, long n, long ar, long ac, long orow, long oc) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < n; j++) o[i * orow + j * oc] = a[i * ar + j * ac];
  for (long k = 0; k < n; k++) {
    long largest = k;
    for (long i = k + 1; i < n; i++)
      if (std::abs(o[i * orow + k * oc]) > std::abs(o[largest * orow + k * oc])) largest = i;
    pivots[k] = static_cast<int32_t>(largest + 1);
    for (long j = 0; largest != k && j < n; j++)
      std::swap(o[k * orow + j * oc], o[largest * orow + j * oc]);
    T* column = o + k * oc;
    if (column[k * orow] == 0) continue;
    for (long i = k + 1; i < n; i++) column[i * orow] /= column[k * orow];
    for (long j = k + 1; j < n; j++) {
      const T factor = o[k * orow + j * oc];
      for (long i = k + 1; i < n; i++) o[i * orow + j * oc] -= column[i * orow] * factor;
    }
  }
}

// X of a X = b, or of a' X = b, by the factors of a.
template <class T>
static void lu_solve(const T* a, const T* b, T* o, const int32_t* pivots, long n, long m, long ar,
                     long ac, long br, long bc, long orow, long oc, bool adjoint) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < m; j++) o[i * orow + j * oc] = b[i * br + j * bc];
  const auto exchange = [&](long k) {
    const long other = pivots[k] - 1;
    for (long j = 0; other != k && j < m; j++)
      std::swap(o[k * orow + j * oc], o[other * orow + j * oc]);
  };
  for (long k = 0; !adjoint && k < n; k++) exchange(k);
  const long sr = adjoint ? ac : ar, sc = adjoint ? ar : ac;  // of a', whose lower factor is u'
  solve_triangular(a, o, o, n, m, sr, sc, orow, oc, orow, oc, false, !adjoint);
  solve_triangular(a, o, o, n, m, sr, sc, orow, oc, orow, oc, true, adjoint);
  for (long k = n - 1; adjoint && k >= 0; k--) exchange(k);
}

template <class T>
static void determinant(const T* factors, const int32_t* pivots, long n, long step, T* value) {
  *value = 1;
  for (long k = 0; k < n; k++)
    *value *= pivots[k] == k + 1 ? factors[k * step] : -factors[k * step];
}
template <class T>
static void log_determinant(const T* factors, const int32_t* pivots, long n, long step, T* sign,
                            T* value) {
  *sign = 1, *value = 0;
  for (long k = 0; k < n; k++) {
    const T x = pivots[k] == k + 1 ? factors[k * step] : -factors[k * step];
    *sign *= x > 0 ? T(1) : x < 0 ? T(-1) : x, *value += std::log(std::abs(x));
  }
}

// The logarithm of a sum of exponentials.
template <class T>
static T log_sum(T a, T b) {
  if (a != a || b != b) return a + b;
  const T high = std::max(a, b), low = std::min(a, b);
  return high == low && std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

template <class T>
static void dense_product(const T* a, const T* b, T* o, long n) {
  std::fill(o, o + n * n, T(0));
  for (long i = 0; i < n; i++)
    for (long k = 0; k < n; k++)
      for (long j = 0; j < n; j++) o[i * n + j] += a[i * n + k] * b[k * n + j];
}
// The exponential of a matrix: its series where it is halved until it is small, and squares of that.
template <class T>
static void exponential(const T* a, T* o, T* power, T* next, long n, long ar, long ac) {
  T largest = 0;  // sum of a row
  for (long i = 0; i < n; i++) {
    T sum = 0;
    for (long j = 0; j < n; j++) sum += std::abs(a[i * ar + j * ac]);
    largest = sum > largest || sum != sum ? sum : largest;
  }
  int halvings = 0;
  while (halvings < 1000 && std::ldexp(largest, -halvings) > T(0.5)) halvings++;
  for (long i = 0; i < n * n; i++)
    power[i] = std::ldexp(a[i / n * ar + i % n * ac], -halvings), o[i] = i / n == i % n;
  for (long term = 14; term > 0; term--) {  // 1 + a (1 + a / 2 (1 + ...)), from within
    dense_product(power, o, next, n);
    for (long i = 0; i < n * n; i++) o[i] = next[i] / T(term) + T(i / n == i % n);
  }
  for (; halvings > 0; halvings--) {
    dense_product(o, o, next, n);
    std::memcpy(o, next, n * n * sizeof(T));
  }
}
