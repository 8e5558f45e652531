//! Plots as SVG, readable on a light and on a dark background. Text stays text.

use std::fmt::{self, Write as _};
use std::ops::Range;

use super::text_table::figure;

const WIDTH: f64 = 860.0;
const MARGIN: f64 = 20.0;
/// The space for the labels on the left of dots, and on the right of lines.
const LABELS: f64 = 270.0;
const ROW: f64 = 22.0;
/// The height of the drawing of lines.
const LINES: f64 = 240.0;
const HEADING: f64 = 58.0;
const AXIS: f64 = 46.0;
/// Colours of the series, each on a light and on a dark background.
const COLOURS: [(&str, &str); 6] = [
    ("#2a78d6", "#3987e5"),
    ("#eb6834", "#d95926"),
    ("#1baf7a", "#199e70"),
    ("#eda100", "#c98500"),
    ("#e87ba4", "#d55181"),
    ("#4a3aa7", "#9085e9"),
];

/// A plot of several panels, one below the other.
#[derive(Clone, Debug, Default)]
pub struct Plot {
    /// The title.
    pub title: String,
    /// The panels.
    pub panels: Vec<Panel>,
}

/// A drawing with axes of its own. Axes of values are logarithmic; values that are not positive are left out.
#[derive(Clone, Debug)]
pub enum Panel {
    /// A row for each label, with a dot for each series: the median, and a line to the 95th percentile.
    Dots {
        /// The title.
        title: String,
        /// The unit of the values.
        unit: String,
        /// The names of the series.
        series: Vec<String>,
        /// The rows.
        rows: Vec<Dots>,
    },
    /// A line for each series.
    Lines {
        /// The title.
        title: String,
        /// The meaning of the horizontal axis.
        across: String,
        /// The unit of the values.
        unit: String,
        /// The series.
        series: Vec<Series>,
    },
}

/// The values of one label.
#[derive(Clone, Debug)]
pub struct Dots {
    /// The label.
    pub label: String,
    /// Median and 95th percentile of each series.
    pub values: Vec<Option<(f64, f64)>>,
}

/// The points of one line.
#[derive(Clone, Debug)]
pub struct Series {
    /// The name.
    pub name: String,
    /// The points.
    pub points: Vec<(f64, f64)>,
}

impl fmt::Display for Plot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut drawing = String::new();
        let mut top = 50.0;
        for panel in &self.panels {
            top += panel.draw(&mut drawing, top)?;
        }
        let title = escaped(&self.title);
        writeln!(
            f,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0}" width="{WIDTH}" height="{top:.0}" role="img" aria-label="{title}">"#
        )?;
        writeln!(f, "<title>{title}</title>\n<style>\n{}</style>", style())?;
        writeln!(f, r#"<rect class="surface" width="{WIDTH}" height="{top:.0}"/>"#)?;
        writeln!(f, r#"<text class="title" x="{MARGIN}" y="32">{title}</text>"#)?;
        writeln!(f, "{drawing}</svg>")
    }
}

fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    for (index, (on_light, on_dark)) in COLOURS.iter().enumerate() {
        for (text, colour) in [(&mut light, on_light), (&mut dark, on_dark)] {
            text.push_str(&format!(".s{index} {{ fill: {colour}; }} .l{index} {{ stroke: {colour}; }}\n"));
        }
    }
    format!(
        "text {{ font: 13px system-ui, sans-serif; fill: #1f1f1e; }}\n\
         text.title {{ font-size: 18px; font-weight: 600; }}\n\
         text.heading {{ font-size: 15px; font-weight: 600; }}\n\
         text.small {{ font-size: 12px; fill: #5c5b57; }}\n\
         .surface {{ fill: #fcfcfb; }} .grid {{ stroke: #e4e3df; }}\n\
         .line {{ fill: none; stroke-width: 2; }}\n{light}\
         @media (prefers-color-scheme: dark) {{\n\
         text {{ fill: #f2f1ee; }}\ntext.small {{ fill: #b5b4ae; }}\n\
         .surface {{ fill: #1a1a19; }} .grid {{ stroke: #3a3936; }}\n{dark}}}\n"
    )
}

impl Panel {
    /// Draws it below `top`; returns its height.
    fn draw(&self, out: &mut String, top: f64) -> Result<f64, fmt::Error> {
        match self {
            Self::Dots { title, unit, series, rows } => {
                heading(out, top, &format!("{title} ({unit}, logarithmic)"))?;
                legend(out, top, series)?;
                draw_dots(out, top + HEADING, rows)
            }
            Self::Lines { title, across, unit, series } => {
                heading(out, top, &format!("{title} ({unit}, logarithmic)"))?;
                draw_lines(out, top + HEADING - 20.0, across, series)
            }
        }
    }
}

fn heading(out: &mut String, top: f64, text: &str) -> fmt::Result {
    writeln!(out, r#"<text class="heading" x="{MARGIN}" y="{:.1}">{}</text>"#, top + 18.0, escaped(text))
}

fn legend(out: &mut String, top: f64, series: &[String]) -> fmt::Result {
    let mut x = LABELS;
    for (index, name) in series.iter().enumerate() {
        let (y, colour) = (top + 38.0, index % COLOURS.len());
        writeln!(out, r#"<circle class="s{colour}" cx="{x:.1}" cy="{:.1}" r="5"/>"#, y - 4.0)?;
        writeln!(out, r#"<text class="small" x="{:.1}" y="{y:.1}">{}</text>"#, x + 10.0, escaped(name))?;
        x += 40.0 + 7.0 * name.chars().count() as f64;
    }
    Ok(())
}

fn draw_dots(out: &mut String, top: f64, rows: &[Dots]) -> Result<f64, fmt::Error> {
    let values = rows.iter().flat_map(|row| &row.values).flatten();
    let axis = Axis::of(values.flat_map(|&(median, high)| [median, high]), LABELS..WIDTH - 118.0);
    let bottom = top + ROW * rows.len() as f64;
    vertical_grid(out, &axis, top..bottom)?;
    for (row, dots) in rows.iter().enumerate() {
        let y = top + ROW * (row as f64 + 0.5);
        writeln!(
            out,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            LABELS - 12.0,
            y + 4.5,
            escaped(&dots.label)
        )?;
        let mut texts = Vec::new();
        for (index, &(median, high)) in
            dots.values.iter().enumerate().filter_map(|(index, value)| Some((index, value.as_ref()?)))
        {
            let colour = index % COLOURS.len();
            let (Some(from), Some(to)) = (axis.position(median), axis.position(high)) else { continue };
            writeln!(out, r#"<path class="line l{colour}" d="M{from:.1} {y:.1}H{to:.1}"/>"#)?;
            writeln!(out, r#"<circle class="s{colour}" cx="{from:.1}" cy="{y:.1}" r="5"/>"#)?;
            texts.push(figure(median));
        }
        let x = WIDTH - 104.0;
        writeln!(out, r#"<text class="small" x="{x:.1}" y="{:.1}">{}</text>"#, y + 4.0, texts.join(" | "))?;
    }
    Ok(HEADING + bottom - top + AXIS)
}

fn draw_lines(out: &mut String, top: f64, across: &str, series: &[Series]) -> Result<f64, fmt::Error> {
    let points = || series.iter().flat_map(|series| &series.points);
    let right = WIDTH - LABELS;
    let horizontal = Axis::of(points().map(|point| point.0), MARGIN + 50.0..right);
    let vertical = Axis::of(points().map(|point| point.1), top + LINES..top);
    vertical_grid(out, &horizontal, top..top + LINES)?;
    for (value, y) in vertical.ticks() {
        let left = MARGIN + 50.0;
        writeln!(out, r#"<path class="grid" d="M{left:.1} {y:.1}H{right:.1}"/>"#)?;
        writeln!(
            out,
            r#"<text class="small" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            left - 8.0,
            y + 4.0,
            tick(value)
        )?;
    }
    let middle = f64::midpoint(MARGIN + 50.0, right);
    let below = top + LINES + 36.0;
    writeln!(
        out,
        r#"<text class="small" x="{middle:.1}" y="{below:.1}" text-anchor="middle">{}</text>"#,
        escaped(across)
    )?;
    let mut labels = Vec::new();
    for (index, series) in series.iter().enumerate() {
        let place = |point: &(f64, f64)| Some((horizontal.position(point.0)?, vertical.position(point.1)?));
        let places: Vec<_> = series.points.iter().filter_map(place).collect();
        let Some(&(_, end)) = places.last() else { continue };
        let colour = index % COLOURS.len();
        let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        writeln!(out, r#"<path class="line l{colour}" d="M{}"/>"#, path.join("L"))?;
        for (x, y) in places {
            writeln!(out, r#"<circle class="s{colour}" cx="{x:.1}" cy="{y:.1}" r="4"/>"#)?;
        }
        labels.push((end, colour, series.name.as_str()));
    }
    for (y, colour, name) in apart(labels) {
        writeln!(out, r#"<circle class="s{colour}" cx="{:.1}" cy="{y:.1}" r="4"/>"#, right + 18.0)?;
        writeln!(out, r#"<text x="{:.1}" y="{:.1}">{}</text>"#, right + 28.0, y + 4.5, escaped(name))?;
    }
    Ok(HEADING - 20.0 + LINES + AXIS + 24.0)
}

/// Moves labels apart that would cover each other.
fn apart(mut labels: Vec<(f64, usize, &str)>) -> Vec<(f64, usize, &str)> {
    const HEIGHT: f64 = 17.0;
    labels.sort_by(|one, other| one.0.total_cmp(&other.0));
    for index in 1..labels.len() {
        labels[index].0 = labels[index].0.max(labels[index - 1].0 + HEIGHT);
    }
    labels
}

fn vertical_grid(out: &mut String, axis: &Axis, height: Range<f64>) -> fmt::Result {
    for (value, x) in axis.ticks() {
        writeln!(out, r#"<path class="grid" d="M{x:.1} {:.1}V{:.1}"/>"#, height.start, height.end)?;
        let y = height.end + 17.0;
        writeln!(
            out,
            r#"<text class="small" x="{x:.1}" y="{y:.1}" text-anchor="middle">{}</text>"#,
            tick(value)
        )?;
    }
    Ok(())
}

fn tick(value: f64) -> String {
    if value < 1.0 { format!("{value}") } else { figure(value).trim_end_matches(".00").replace(".0", "") }
}

/// A logarithmic axis over whole decades.
struct Axis {
    decades: Range<i32>,
    place: Range<f64>,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>, place: Range<f64>) -> Self {
        let (mut first, mut last) = (i32::MAX, i32::MIN);
        for value in values.filter(|value| *value > 0.0 && value.is_finite()) {
            // f64's decades fit into an i32.
            #[allow(clippy::cast_possible_truncation)]
            let (below, above) = (value.log10().floor() as i32, value.log10().ceil() as i32);
            (first, last) = (first.min(below), last.max(above));
        }
        if first > last {
            (first, last) = (0, 1);
        }
        Self { decades: first..last.max(first + 1), place }
    }

    fn position(&self, value: f64) -> Option<f64> {
        let is_drawable = value > 0.0 && value.is_finite();
        is_drawable.then(|| {
            let part = (value.log10() - f64::from(self.decades.start))
                / f64::from(self.decades.end - self.decades.start);
            self.place.start + part * (self.place.end - self.place.start)
        })
    }

    fn ticks(&self) -> Vec<(f64, f64)> {
        let decades = self.decades.start..=self.decades.end;
        decades
            .map(|decade| 10_f64.powi(decade))
            .filter_map(|value| Some((value, self.position(value)?)))
            .collect()
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        let _never_fails = match character {
            '&' => escaped.write_str("&amp;"),
            '<' => escaped.write_str("&lt;"),
            '>' => escaped.write_str("&gt;"),
            '"' => escaped.write_str("&quot;"),
            other => escaped.write_char(other),
        };
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> Plot {
        let row = |label: &str, values| Dots { label: label.to_owned(), values };
        let rows = vec![
            row("ioctls & \"udev\" <2>", vec![Some((0.2, 0.5)), Some((0.1, 0.3))]),
            row("UDisks2", vec![Some((35.0, 115.0)), None]),
        ];
        let line =
            |name: &str, points: &[(f64, f64)]| Series { name: name.to_owned(), points: points.to_vec() };
        let series =
            vec![line("loopd", &[(1.0, 0.5), (1000.0, 0.6)]), line("ioctls", &[(1.0, 0.2), (1000.0, 0.0)])];
        Plot {
            title: "a < b & c".to_owned(),
            panels: vec![
                Panel::Dots {
                    title: "attach".to_owned(),
                    unit: "ms".to_owned(),
                    series: ["attach", "detach"].map(str::to_owned).to_vec(),
                    rows,
                },
                Panel::Lines {
                    title: "growth".to_owned(),
                    across: "devices".to_owned(),
                    unit: "ms".to_owned(),
                    series,
                },
            ],
        }
    }

    #[test]
    fn svg_is_valid_and_its_text_is_text() {
        let svg = plot().to_string();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let texts: Vec<_> = document
            .descendants()
            .filter(|node| node.has_tag_name("text"))
            .filter_map(|node| node.text())
            .collect();
        for expected in ["a < b & c", "ioctls & \"udev\" <2>", "35.0", "1,000", "0.1", "loopd"] {
            assert!(texts.contains(&expected), "{expected}: {texts:?}");
        }
        assert!(svg.contains("prefers-color-scheme: dark"));
    }

    #[test]
    fn drawing_stays_within_the_plot() {
        let svg = plot().to_string();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let number = |node: roxmltree::Node<'_, '_>, name| {
            node.attribute(name).map(|text| text.parse::<f64>().unwrap())
        };
        let height = number(document.root_element(), "height").unwrap();
        for node in document.descendants() {
            for (name, limit) in [("x", WIDTH), ("cx", WIDTH), ("y", height), ("cy", height)] {
                assert!(number(node, name).is_none_or(|at| (0.0..=limit).contains(&at)), "{node:?}");
            }
        }
    }

    #[test]
    fn values_that_are_not_positive_are_left_out() {
        let svg = plot().to_string();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let empty = Plot { title: String::new(), panels: vec![] }.to_string();
        roxmltree::Document::parse(&empty).unwrap();
    }

    #[test]
    fn axis_has_whole_decades() {
        let axis = Axis::of([0.2, 35.0].into_iter(), 0.0..300.0);
        let ticks: Vec<_> = axis.ticks().into_iter().map(|(value, _)| tick(value)).collect();
        assert_eq!(ticks, ["0.1", "1", "10", "100"]);
        assert_eq!(axis.position(1.0), Some(100.0));
        assert_eq!(axis.position(0.0), None);
    }

    #[test]
    fn labels_do_not_cover_each_other() {
        let moved = apart(vec![(10.0, 0, "a"), (11.0, 1, "b"), (90.0, 2, "c")]);
        assert_eq!(moved.iter().map(|label| label.0).collect::<Vec<_>>(), [10.0, 27.0, 90.0]);
    }
}
