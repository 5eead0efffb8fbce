//! Columns for the terminal: plain text that also survives `grep` and `less`. No colours, no frames.

/// Rows under a header; numbers stand to the right.
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    /// One or more lines.
    title: Vec<String>,
    right: bool,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { columns: Vec::new(), rows: Vec::new() }
    }

    /// Adds a column of texts. A line break in the title makes the header higher and the column narrower.
    pub(super) fn text(mut self, title: &str) -> Self {
        self.columns.push(Column { title: title.lines().map(str::to_owned).collect(), right: false });
        self
    }

    /// Adds a column of numbers.
    pub(super) fn number(mut self, title: &str) -> Self {
        self = self.text(title);
        if let Some(column) = self.columns.last_mut() {
            column.right = true;
        }
        self
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table, each line after `indent` spaces and ended.
    pub(super) fn render(&self, indent: usize) -> String {
        let widths: Vec<usize> = self.columns.iter().enumerate().map(|(at, column)| self.width(at, column)).collect();
        let height = self.columns.iter().map(|column| column.title.len()).max().unwrap_or(0);
        let header = (0..height).map(|line| {
            let title = |column: &Column| {
                // Titles of less lines stand at the bottom.
                let at = (line + column.title.len()).checked_sub(height);
                at.and_then(|at| column.title.get(at).cloned()).unwrap_or_default()
            };
            self.columns.iter().map(title).collect()
        });
        let header: Vec<Vec<String>> = header.collect();
        let mut text = String::new();
        for cells in header.iter().chain(&self.rows) {
            let cells = cells.iter().zip(&self.columns).zip(&widths).map(|((cell, column), width)| {
                if column.right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            text += &" ".repeat(indent);
            text += line.trim_end();
            text.push('\n');
        }
        text
    }

    fn width(&self, at: usize, column: &Column) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(at));
        cells.chain(&column.title).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

/// At most so many characters, the end given up for an ellipsis.
pub(super) fn shortened(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    text.chars().take(chars_max.saturating_sub(1)).chain(['…']).collect()
}

/// A count in at most five characters: `950`, `12.3k`, `4.5M`.
pub(super) fn compact(count: f64) -> String {
    for (unit, from) in [("G", 1e9), ("M", 1e6), ("k", 1e3)] {
        // What would be rounded up to the next unit is shown in it.
        if count >= from * 0.999_95 {
            let scaled = count / from;
            return if scaled >= 99.95 { format!("{scaled:.0}{unit}") } else { format!("{scaled:.1}{unit}") };
        }
    }
    format!("{count:.0}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new().text("WORKER").number("drain\ntime").number("N");
        table.row(vec!["gpu-ä".into(), "0.1".into(), "10".into()]);
        table.row(vec!["b".into(), "-12.25".into(), String::new()]);
        let expect = "           drain\n  WORKER    time   N\n  gpu-ä      0.1  10\n  b       -12.25\n";
        assert_eq!(table.render(2), expect);
    }

    #[test]
    fn counts_and_names_keep_short() {
        for (count, expect) in [
            (0.0, "0"),
            (999.0, "999"),
            (1000.0, "1.0k"),
            (12_345.0, "12.3k"),
            (99_990.0, "100k"),
            (999_960.0, "1.0M"),
            (4_500_000.0, "4.5M"),
            (2e9, "2.0G"),
        ] {
            assert_eq!(compact(count), expect);
        }
        assert_eq!((shortened("abc", 3), shortened("abcd", 3)), ("abc".into(), "ab…".into()));
    }
}
