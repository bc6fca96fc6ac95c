// Symmetric matrices with few bands: entry k of row i is the matrix's at (i, i - k).
#include <algorithm>
#include <cmath>

namespace banded {
static const long WIDE = 8;  // entries that are multiplied one by one, without vectors of them

// x_i += f_i x_{i-1}, in place, from the first number on or, for STEP -1, from the last. Each waits
// for the fourth before it alone: what lies between does not hang on it.
template <long STEP, class T>
static void recur(long n, const T *factor, T *x) {
  if (STEP < 0) factor += n - 1, x += n - 1;
  T before = 0;
  long i = 0;
  for (; i + 4 <= n; i += 4, factor += 4 * STEP, x += 4 * STEP) {
    const T f0 = factor[0], f1 = factor[STEP], f2 = factor[2 * STEP], f3 = factor[3 * STEP];
    const T x0 = x[0], x1 = x[STEP] + f1 * x0, x2 = x[2 * STEP] + f2 * x1, x3 = x[3 * STEP] + f3 * x2;
    const T g1 = f1 * f0, g2 = f2 * g1, g3 = f3 * g2;
    x[0] = x0 + f0 * before, x[STEP] = x1 + g1 * before, x[2 * STEP] = x2 + g2 * before;
    x[3 * STEP] = before = x3 + g3 * before;
  }
  for (; i < n; i++, factor += STEP, x += STEP) *x = before = *x + *factor * before;
}
// With two bands. Pivots are quotients of the leading minors of the matrix with ones on its
// diagonal, which take no division one after the other: d_i = d_{i-1} - c_i d_{i-2}.
template <class T>
static void factorise_pairs(long n, const T *matrix, T *root) {
  const long ALIKE = sizeof(T) == 8 ? 16 : 4;  // minors that lie within the range of numbers
  T *inverse = new T[3 * n], *square = inverse + n, *share = square + n;
  for (long i = 0; i < n; i++) inverse[i] = 1 / matrix[i * 2];
  square[0] = 0;
  for (long i = 1; i < n; i++) {
    const T beside = matrix[i * 2 + 1];
    square[i] = beside * inverse[i] * (beside * inverse[i - 1]);
  }
  T before = 1, minor = 1;
  for (long i = 0; i < n;) {
    for (const long end = std::min(n, i + ALIKE); i < end; i++) {
      const T next = minor - square[i] * before;
      share[i] = next / minor;
      before = minor, minor = next;
    }
    before /= minor, minor = 1;
  }
  for (long i = 0; i < n; i++) inverse[i] = 1 / (share[i] = std::sqrt(matrix[i * 2] * share[i]));
  root[0] = share[0], root[1] = 0;
  for (long i = 1; i < n; i++)
    root[i * 2] = share[i], root[i * 2 + 1] = matrix[i * 2 + 1] * inverse[i - 1];
  delete[] inverse;
}
// With all bands: as a matrix, whose number at (i, j) lies at i (n + 1) - j.
template <class T>
static void factorise_full(long n, const T *matrix, T *root) {
  T *square = new T[n * n];
  cholesky(matrix, square, n, n + 1, -1, 1, n);
  std::fill(root, root + n * n, T(0));
  for (long j = 0; j < n; j++)
    for (long i = j; i < n; i++) root[i * (n + 1) - j] = square[j * n + i];
  delete[] square;
}
// Pivots first, so that one division alone lies between rows, which wait for each other.
template <class T>
static void factorise(long batch, long n, long q, const T *matrix, T *root) {
  T *inverse = new T[n + q], *row = inverse + n;
  for (long r = 0; r < batch; r++, matrix += n * q, root += n * q) {
    if (q == 2) {
      factorise_pairs(n, matrix, root);
      continue;
    }
    if (q == n) {
      factorise_full(n, matrix, root);
      continue;
    }
    for (long i = 0; i < n; i++) {
      const long m = i < q - 1 ? i : q - 1;
      T pivot = matrix[i * q];
      for (long k = q - 1; k > m; k--) root[i * q + k] = 0;
      for (long k = m; k > 0; k--) {
        const T *other = root + (i - k) * q;
        T t = matrix[i * q + k];
        if (m - k < WIDE)
          for (long c = 1; k + c <= m; c++) t -= row[k + c] * other[c];
        else {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (long c = 1; c <= m - k; c++) sum += row[k + c] * other[c];
          t -= sum;
        }
        row[k] = t * inverse[i - k];
        root[i * q + k] = t;
        pivot -= row[k] * t;
      }
      root[i * q] = pivot;
      inverse[i] = 1 / pivot;
    }
    for (long i = 0; i < n; i++) inverse[i] = 1 / (root[i * q] = std::sqrt(root[i * q]));
    for (long i = 0; i < n; i++)
      for (long k = 1; k < q && k <= i; k++) root[i * q + k] *= inverse[i - k];
  }
  delete[] inverse;
}
template <class T>
static void factorise_adjoint_pairs(long n, const T *root, const T *slope, T *result) {
  T *inverse = new T[3 * n], *factor = inverse + n, *whole = factor + n;
  for (long i = 0; i < n; i++) inverse[i] = 1 / root[i * 2];
  for (long i = 0; i < n - 1; i++) {
    const T beside = root[i * 2 + 3], scaled = beside * inverse[i];
    factor[i] = scaled * beside * inverse[i + 1];
    whole[i] = slope[i * 2] - slope[i * 2 + 3] * scaled;
  }
  factor[n - 1] = 0, whole[n - 1] = slope[n * 2 - 2];
  recur<-1>(n, factor, whole);
  result[0] = whole[0] * inverse[0] / 2, result[1] = 0;
  for (long i = 1; i < n; i++) {
    const T twice = whole[i] * inverse[i];
    result[i * 2] = twice / 2;
    result[i * 2 + 1] = (slope[i * 2 + 1] - twice * root[i * 2 + 1]) * inverse[i - 1];
  }
  delete[] inverse;
}
template <class T>
static void factorise_adjoint(long batch, long n, long q, const T *root, T *slope, T *result) {
  T *inverse = new T[n];
  for (long r = 0; r < batch; r++, root += n * q, slope += n * q, result += n * q) {
    if (q == 2) {
      factorise_adjoint_pairs(n, root, slope, result);
      continue;
    }
    for (long i = 0; i < n; i++) inverse[i] = 1 / root[i * q];
    for (long i = n - 1; i >= 0; i--) {
      const long m = i < q - 1 ? i : q - 1;
      const T *own = root + i * q;
      T *here = slope + i * q;
      const T twice = here[0] * inverse[i];
      result[i * q] = twice / 2;
      for (long c = 1; c <= m; c++) here[c] -= twice * own[c];
      for (long k = m + 1; k < q; k++) result[i * q + k] = 0;
      for (long k = 1; k <= m; k++) {
        const T *other = root + (i - k) * q;
        T *there = slope + (i - k) * q, t = here[k] * inverse[i - k];
        there[0] -= t * own[k];
        result[i * q + k] = t;
        if (m - k < WIDE)
          for (long c = 1; k + c <= m; c++) here[k + c] -= t * other[c], there[c] -= t * own[k + c];
        else
#pragma omp simd
          for (long c = 1; c <= m - k; c++) here[k + c] -= t * other[c], there[c] -= t * own[k + c];
      }
    }
  }
  delete[] inverse;
}
// The same entries beside the diagonal, and enough on it.
template <class T>
static void dominate(long n, long q, const T *matrix, T *result) {
  T least = 0, *scale = new T[2 * n], *beside = scale + n;
  for (long i = 0; i < n; i++) least = std::max(least, std::abs(matrix[i * q]));
  least *= T(1e-6);
  for (long i = 0; i < n; i++) scale[i] = std::sqrt(std::max(std::abs(matrix[i * q]), least)), beside[i] = 0;
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q; k++) {
      result[i * q + k] = matrix[i * q + k];
      if (k > i) continue;
      const T relative = std::abs(matrix[i * q + k]) / (scale[i] * scale[i - k]);
      beside[i] += relative, beside[i - k] += relative;
    }
  for (long i = 0; i < n; i++) {
    const T enough = scale[i] * scale[i] * beside[i] * T(1.01) + least;
    result[i * q] = matrix[i * q] > enough ? matrix[i * q] : enough;
  }
  delete[] scale;
}
// From slopes in what `dominate` makes to those in the matrix, in place.
template <class T>
static void dominate_adjoint(long n, long q, const T *matrix, T *slope) {
  T largest = 0, least_slope = 0, *size = new T[4 * n];
  T *beside = size + n, *taken = beside + n, *moved = taken + n;
  long at = 0;
  for (long i = 0; i < n; i++)
    if (std::abs(matrix[i * q]) > largest) largest = std::abs(matrix[i * q]), at = i;
  const T least = largest * T(1e-6);
  for (long i = 0; i < n; i++)
    size[i] = std::max(std::abs(matrix[i * q]), least), beside[i] = moved[i] = 0;
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q && k <= i; k++) {
      const T relative = std::abs(matrix[i * q + k]) / std::sqrt(size[i] * size[i - k]);
      beside[i] += relative, beside[i - k] += relative;
    }
  for (long i = 0; i < n; i++) {
    taken[i] = matrix[i * q] > size[i] * beside[i] * T(1.01) + least ? 0 : slope[i * q];
    slope[i * q] -= taken[i];
    least_slope += taken[i];
  }
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q && k <= i; k++) {
      const long j = i - k;
      const T entry = matrix[i * q + k] * T(1.01), ratio = std::sqrt(size[i] / size[j]);
      const T up = taken[i] * ratio, down = taken[j] / ratio;
      const T sign = (entry > 0) - (entry < 0), half = std::abs(entry) / 2 * (up - down);
      slope[i * q + k] += T(1.01) * sign * (up + down);
      moved[i] += half / size[i], moved[j] -= half / size[j];
    }
  for (long i = 0; i < n; i++) {
    const T sign = (matrix[i * q] > 0) - (matrix[i * q] < 0);
    if (std::abs(matrix[i * q]) > least) slope[i * q] += sign * moved[i];
    else least_slope += moved[i];
  }
  slope[at * q] += ((matrix[at * q] > 0) - (matrix[at * q] < 0)) * T(1e-6) * least_slope;
  delete[] size;
}
template <class T>
static void root(long batch, long n, long q, const T *matrix, T *root, T *mended) {
  for (long r = 0; r < batch; r++, matrix += n * q, root += n * q) {
    factorise(1, n, q, matrix, root);
    bool defined = true;
    for (long i = 0; i < n; i++) defined &= root[i * q] > 0 && root[i * q] - root[i * q] == 0;
    mended[r] = !defined;
    if (defined) continue;
    T *other = new T[n * q];
    dominate(n, q, matrix, other);
    factorise(1, n, q, other, root);
    delete[] other;
  }
}
template <class T>
static void root_adjoint(long batch, long n, long q, const T *matrix, const T *root,
                         const T *mended, T *slope, T *result) {
  factorise_adjoint(batch, n, q, root, slope, result);
  for (long r = 0; r < batch; r++, matrix += n * q, result += n * q)
    if (mended[r] != 0) dominate_adjoint(n, q, matrix, result);
}
// With two bands, four vectors at once: each waits for its own last number.
template <class T>
static void solve_four(long n, long transposed, const T *root, const T *vectors, T *result) {
  T x[4] = {};
  if (transposed) {
    T next = 0;
    for (long i = n - 1; i >= 0; i--) {
      const T inverse = 1 / root[i * 2], factor = next * inverse;
      for (long w = 0; w < 4; w++)
        result[w * n + i] = x[w] = vectors[w * n + i] * inverse - factor * x[w];
      next = root[i * 2 + 1];
    }
  } else
    for (long i = 0; i < n; i++) {
      const T inverse = 1 / root[i * 2], factor = i ? root[i * 2 + 1] * inverse : 0;
      for (long w = 0; w < 4; w++)
        result[w * n + i] = x[w] = vectors[w * n + i] * inverse - factor * x[w];
    }
}
template <class T>
static void solve_pair(long n, long transposed, const T *root, const T *vector, T *result) {
  T *factor = new T[n];
  for (long i = 0; i < n; i++) {
    const T inverse = 1 / root[i * 2];
    const T beside = !transposed ? root[i * 2 + 1] : i < n - 1 ? root[i * 2 + 3] : 0;
    factor[i] = -beside * inverse, result[i] = vector[i] * inverse;
  }
  transposed ? recur<-1>(n, factor, result) : recur<1>(n, factor, result);
  delete[] factor;
}
template <class T>
static void solve(long batch, long count, long n, long q, long transposed, const T *root,
                  const T *vectors, T *result) {
  for (long r = 0; r < batch; r++, root += n * q) {
    long w = 0;
    for (; q == 2 && w + 4 <= count; w += 4, vectors += 4 * n, result += 4 * n)
      solve_four(n, transposed, root, vectors, result);
    for (; w < count; w++, vectors += n, result += n) {
      if (q == 2)
        solve_pair(n, transposed, root, vectors, result);
      else if (transposed) {
        for (long i = 0; i < n; i++) result[i] = vectors[i];
        for (long i = n - 1; i >= 0; i--) {
          const T x = result[i] / root[i * q], *row = root + i * q;
          const long m = i < q - 1 ? i : q - 1;
          result[i] = x;
#pragma omp simd
          for (long k = 1; k <= m; k++) result[i - k] -= row[k] * x;
        }
      } else
        for (long i = 0; i < n; i++) {
          const T *row = root + i * q;
          const long m = i < q - 1 ? i : q - 1;
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (long k = 1; k <= m; k++) sum += row[k] * result[i - k];
          result[i] = (vectors[i] - sum) / row[0];
        }
    }
  }
}
// The product of L, or of its transpose, with vectors.
template <class T>
static void times(long batch, long count, long n, long q, long transposed, const T *root,
                  const T *vectors, T *result) {
  for (long r = 0; r < batch; r++, root += n * q)
    for (long w = 0; w < count; w++, vectors += n, result += n)
      for (long i = 0; i < n; i++) {
        const T *row = root + i * q, x = vectors[i];
        const long m = i < q - 1 ? i : q - 1;
        if (transposed) {
          result[i] = row[0] * x;
#pragma omp simd
          for (long k = 1; k <= m; k++) result[i - k] += row[k] * x;
        } else {
          T sum = row[0] * x;
#pragma omp simd reduction(+ : sum)
          for (long k = 1; k <= m; k++) sum += row[k] * vectors[i - k];
          result[i] = sum;
        }
      }
}
template <class T>
static void outer(long batch, long count, long n, long q, const T *left, const T *right,
                  T *result) {
  for (long r = 0; r < batch; r++, result += n * q) {
    for (long i = 0; i < n * q; i++) result[i] = 0;
    for (long w = 0; w < count; w++, left += n, right += n)
      for (long i = 0; i < n; i++)
        for (long k = 0; k < q && k <= i; k++) result[i * q + k] += left[i] * right[i - k];
  }
}
}  // namespace banded
